"""Delivers observations: turns numbers that have arrived on the host into a Snapshot with alerts, and hands it to the sinks.

A *sink* is a function that is called with each Snapshot. Nothing here waits for a device. Numbers that have arrived are delivered at the end of a
later step, in the order of steps. Numbers that all ranks share become visible on all of them at the end of the same step, so that a training loop
that stops on an alert stops on every rank.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

from torchsat.alerts import Firing
from torchsat.coverage import Coverage
from torchsat.diagnosis import Diagnosis
from torchsat.faults import Faults
from torchsat.history import History
from torchsat.judge import Judge
from torchsat.log_lines import directory_of, tell, tell_end
from torchsat.observe.observation import Retry
from torchsat.options import Options, Sink
from torchsat.percent import listed
from torchsat.process import undisturbed
from torchsat.record import Alert, Snapshot
from torchsat.rows import Stuck, experts_of, to_formats, to_ledger, to_record, to_weight
from torchsat.sites import Sites
from torchsat.spectrum import with_spectra
from torchsat.tensorboard import SUBRUN
from torchsat.transport import meeting
from torchsat.transport.flight import Flight
from torchsat.transport.packing import Numbers
from torchsat.transport.parallel import default_group
from torchsat.transport.route import Route

log = logging.getLogger("torchsat")

_MOST_IN_FLIGHT = 16
"""The most observations on their way to the host. If there are more, the oldest is waited for: a device that is this far behind would otherwise fill
the host's pinned memory."""


class Delivery:
    """Delivers the observations of one monitor.

    Args:
        model: the name of the model's class, for messages.
    """

    def __init__(self, options: Options, model: str, sites: Sites, route: Route, faults: Faults) -> None:
        self.model = model
        """The name of the model's class. It is needed in messages when the model may be gone."""
        self._sites = sites
        self._route = route
        self._faults = faults
        self._on_alert = options.on_alert
        self._sinks: list[Sink] = list(options.sinks or ())
        self._judge = Judge(options.rules, faults.report)
        self._diagnosis = Diagnosis()
        self.remembered = History()
        """What the figures and the card of the monitor show."""
        self._stuck: dict[str, Stuck] = {}
        """For each site, its stuck units as far as they are known (rows.py)."""
        self.in_flight: list[Flight] = []
        """The observations that are on their way to the host, oldest first."""
        self._delivering = threading.RLock()
        """Held by the thread that delivers. At SIGTERM that may be another one than the training thread (process.py)."""
        self._directory = directory_of(options.log_dir, options.writer)
        self._announced = False
        self._told_unregistered = False
        self._moved = False
        self._nothing = "of its activations, include= and exclude= leave none" if options.include or options.exclude else "no activation was found"
        self.latest: Snapshot | None = None
        """The newest snapshot that has reached the host."""
        if options.log_dir is not None or options.writer is not None:
            from torchsat.tensorboard.writer import TensorBoardWriter

            files = TensorBoardWriter(options.log_dir, options.writer)
            self._sinks.insert(0, files)
            if default_group() is None and int(os.environ.get("WORLD_SIZE") or 1) < 2:
                # In a job of several ranks only one writes files, and the others should not create any. Ranks may be set up only after this.
                files.open()

    @property
    def alerts(self) -> tuple[Alert, ...]:
        """The alerts that fire now, worst first."""
        return self._diagnosis.firing

    @property
    def coverage(self) -> Coverage:
        """The sites that are seen on any rank, and the places that are not seen on this one."""
        return self._sites.coverage(self._route.kinds)

    def add_sink(self, sink: Sink) -> None:
        """Call this function, too, with each Snapshot from now on."""
        self._sinks.append(sink)

    def history(self) -> dict[str, Any]:
        """What is remembered of earlier observations, in plain types."""
        stuck = {name: [known.share, known.samples] for name, known in self._stuck.items()}
        return {"stuck": stuck, "judge": self._judge.state_dict(), "diagnosis": self._diagnosis.state_dict()}

    def take_up(self, history: dict[str, Any]) -> None:
        """Continue with the `history` of another monitor."""
        stuck = {name: Stuck(float(share), int(samples)) for name, (share, samples) in history["stuck"].items()}
        self._judge.load_state_dict(history["judge"])
        self._diagnosis.load_state_dict(history["diagnosis"])
        self._stuck = stuck
        self.remembered.take_up(self._diagnosis.firing)

    def resume(self, log_dir: str | os.PathLike[str] | None, start: int | Literal["resume"]) -> int:
        """Continue with the alerts that the event files of an earlier session show. Returns the number of the first step."""
        if start == 0 or log_dir is None:
            return 0 if start == "resume" else start
        from torchsat.tensorboard.reader import read_runs

        try:
            history = read_runs(os.path.join(os.fspath(log_dir), SUBRUN))[-1].snapshots
        except FileNotFoundError:
            return 0 if start == "resume" else start
        step = history[-1].step + 1 if start == "resume" else start
        history = [snapshot for snapshot in history if snapshot.step < step]
        told = tuple(Firing(alert for snapshot in history for alert in snapshot.alerts))
        if history:
            self._judge.resume(told, len(history), history[0])
            self._diagnosis.resume(told, history[0], history[-1])
            self.remembered.take_up(told)
        return step

    def add(self, flight: Flight | None) -> None:
        """Add an observation that is on its way to the host; None: nothing was sent."""
        if flight is not None:
            self.in_flight.append(flight)

    def drain(self, step: int, overhead: float | None, wait: float = 0.0) -> Retry | None:
        """Deliver the observations that have arrived, in order. With `wait`, wait up to so many seconds for each, so that all are delivered.

        Args:
            step: the number of the step that ends now.
            overhead: the share of training time that observing took lately.

        Returns:
            OVERFLOW if one of the delivered observations is of a step that the optimizer skipped.
        """
        retry = None
        if len(self.in_flight) > _MOST_IN_FLIGHT:
            wait = max(wait, meeting.PATIENCE)
        while self.in_flight:
            flight = self.in_flight[0]
            if flight.layout.shared and self._route.together:
                if not wait and step < flight.step + meeting.LAG:
                    break
                flight.wait(wait or meeting.GRACE)
            elif wait:
                flight.wait(wait)
            elif not flight.arrived():
                break
            with undisturbed(), self._delivering:
                if flight in self.in_flight:
                    self.in_flight.remove(flight)
                    retry = self._deliver(flight, overhead) or retry
        return retry

    def _deliver(self, flight: Flight, overhead: float | None) -> Retry | None:
        numbers = self._route.read(flight)
        if numbers.skipped:
            # All ranks must observe the same steps, so one rank alone cannot observe a further one.
            return None if self._route.together else Retry.OVERFLOW
        snapshot = self._snapshot(flight, numbers, overhead)
        if snapshot is None:
            return None
        self.latest = snapshot
        self.remembered.add(snapshot)
        if self._route.speaks:
            self._announce(snapshot)
            self._move_files()
            # The file writer is the first sink, and `on_alert` comes after all sinks: a callback may close the monitor.
            for sink in list(self._sinks):
                self._to_sink(sink, functools.partial(sink, snapshot))
            for alert in snapshot.alerts:
                self._alert(alert)
        return None

    def _snapshot(self, flight: Flight, numbers: Numbers, overhead: float | None) -> Snapshot | None:
        """The Snapshot of an observation; None where several ranks took part and none of them measured anything."""
        records = []
        for row in numbers.sites:
            record, stuck = to_record(row, numbers.scale, self._stuck.get(row.facts.site))
            if stuck is not None:
                self._stuck[row.facts.site] = stuck
            if record.n or record.nonfinite:
                records.append(record)
        if not records and flight.layout.shared:
            if not flight.layout.sites and not self._sites.has_modules:
                self.say_nothing_watched()
            return None
        weights = tuple(to_weight(row) for row in numbers.layers)
        tallies, told = numbers.tallies, with_spectra(records, numbers.tallies)
        ledger, experts, formats = to_ledger(tallies, numbers.scale), experts_of(tallies), to_formats(tallies)
        made = Snapshot(flight.step, flight.time, told, weights, overhead=overhead, ledger=ledger)
        snapshot = replace(made, experts=experts, formats=formats)
        events = self._judge.judge(snapshot)
        snapshot = self._judge.marked(snapshot)
        return replace(snapshot, alerts=self._diagnosis.judge(events, self._judge.firing, snapshot, self._judge.pending))

    def _announce(self, snapshot: Snapshot) -> None:
        """Log one line after the first observation, which says what is watched and what is not."""
        if self._announced:
            return
        self._announced = True
        rest = f"; {self._not_seen}, see monitor.coverage" if self._not_seen else ""
        log.info("torchsat: watching %s and %d layers%s", self.coverage.described, len(snapshot.weights), rest)

    def say_nothing_watched(self, why: str | None = None) -> None:
        """Log one line if the model has no activation that can be watched, or for another reason `why`."""
        if not self._announced and self._route.speaks:
            self._announced = True
            rest = f" ({self._not_seen})" if self._not_seen else ""
            log.warning("torchsat: %s: %s, nothing is watched%s. See monitor.coverage.", self.model, why or self._nothing, rest)

    @property
    def _not_seen(self) -> str:
        """How many places are not seen, and the first of them; empty where there are none."""
        unseen = self.coverage.unseen
        names = ", ".join(place for place, _ in unseen[:3]) + (", ..." if len(unseen) > 3 else "")
        return f"not seen: {len(unseen)} ({names})" if unseen else ""

    def say_unregistered(self, places: Mapping[str, str]) -> None:
        """Log one line for modules that the model holds and torch does not know, by place with the reason, the first time there are any."""
        if places and not self._told_unregistered and self._route.speaks:
            self._told_unregistered = True
            (first, reason), more = next(iter(places.items())), len(places) - 1
            log.warning("torchsat: %s%s: %s. See monitor.coverage.", first, f" and {more} more" if more else "", reason)

    def say_no_step(self, steps: int) -> None:
        """Log one line after so many steps of optimizers that own nothing of the model."""
        if self._route.speaks:
            why = "none of one that owns parameters of"
            log.warning("torchsat: %d steps of optimizers were seen, and %s %s: nothing is watched. See monitor.coverage.", steps, why, self.model)

    def say_stopped(self, step: int, names: list[str]) -> None:
        """Log one line for sites that ran before and no longer do."""
        if names and self._route.speaks:
            log.warning("torchsat: step %d: %s ran before, but not in the last observations.", step, listed(names, 5))

    def _move_files(self) -> None:
        """On every rank but the first of the job, write to a sub-directory `rank<n>`, so that the files of different ranks do not mix."""
        if self._route.rank and not self._moved:
            self._moved = True
            for sink in self._sinks:
                if hasattr(sink, "move"):
                    sink.move(f"rank{self._route.rank}")

    def _alert(self, alert: Alert) -> None:
        tell(log, alert)
        if self._on_alert is not None:
            try:
                self._on_alert(alert)
            except Exception as error:
                self._on_alert = None
                self._faults.report("on_alert", error, "it is not called again")

    def flush(self) -> None:
        """Wait for the sinks."""
        for sink in list(self._sinks):
            self._to_sink(sink, getattr(sink, "flush", None))

    def say_end(self) -> None:
        """Log one line with the verdict on the run, if anything was observed."""
        if self.latest is None or not self._route.speaks:
            return
        tell_end(log, self.remembered.verdict(self.alerts), self._directory)

    def close(self) -> None:
        """Close the sinks."""
        for sink in list(self._sinks):
            self._to_sink(sink, getattr(sink, "close", None))
        self._sinks.clear()

    def _to_sink(self, sink: Sink, call: Callable[[], Any] | None) -> None:
        """Call a sink; one that raises is closed and gets no more snapshots."""
        if call is None:
            return
        try:
            call()
        except Exception as error:
            if sink in self._sinks:
                self._sinks.remove(sink)
                with contextlib.suppress(Exception):
                    getattr(sink, "close", lambda: None)()
            self._faults.report(f"sink {getattr(sink, '__qualname__', type(sink).__name__)}", error, "it gets no more snapshots")
