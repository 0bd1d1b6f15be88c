"""What `try_remedies` found out: one `Trial` for each remedy, and how they compare. Never torch.

What is measured on one seed may be chance. Where several were asked for, the loss of a trial is their mean, and a difference counts only where it is
larger than the spreads of both sides.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torchsat.cards import card
from torchsat.comparison import Compared, table, treatment
from torchsat.percent import percent
from torchsat.record import Snapshot
from torchsat.shown import Shown
from torchsat.tables import page_for
from torchsat.terminal import PROSE, wrapped

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class Trial(Shown):
    """How one copy of the model trained."""

    remedy: str
    """The name of the remedy that was applied."""
    change: str
    """What the remedy changed, or why it could not be tried."""
    losses: tuple[float, ...] = ()
    """The loss of each step, of the first seed."""
    snapshots: tuple[Snapshot, ...] = ()
    """The observations of the first seed, in the order of their steps."""
    repeats: tuple[tuple[float, ...], ...] = ()
    """The losses of the other seeds."""
    code: str = ""
    """The change as code, which can be pasted where `model`, and for the learning rate `optimizer`, are known. Empty where the remedy has none."""

    @property
    def tried(self) -> bool:
        """Whether the copy was trained."""
        return bool(self.losses)

    @property
    def in_short(self) -> str:
        """The remedy and the loss at its end."""
        return f"{self.remedy}: loss {self.loss:.3g}" if self.tried else f"{self.remedy}: not tried"

    @property
    def ends(self) -> tuple[float, ...]:
        """The loss at the end for each seed: the mean of the last tenth of the steps."""
        return tuple(statistics.fmean(losses[-max(1, len(losses) // 10) :]) for losses in (self.losses, *self.repeats) if losses)

    @property
    def loss(self) -> float:
        """The mean of `ends`; NaN where the remedy was not tried."""
        return sum(self.ends) / len(self.ends) if self.ends else math.nan

    @property
    def spread(self) -> float | None:
        """The standard deviation of `ends` over the seeds; None where there is one seed, or where one of them diverged."""
        return statistics.stdev(self.ends) if len(self.ends) > 1 and all(map(math.isfinite, self.ends)) else None

    def worst(self, name: str, at: int = -1) -> float | None:
        """The worst value of an attribute of `Record` over the hidden sites.

        That is the largest value of `saturated` and `stuck`, and the smallest of every other attribute. None where no site has a value.

        Args:
            at: the index of the observation in `snapshots`.
        """
        hidden = [record for record in self.snapshots[at].records if not (record.output or record.gate)] if self.snapshots else []
        values = [value for record in hidden if (value := getattr(record, name)) is not None]
        return None if not values else max(values) if name in ("saturated", "stuck") else min(values)

    def first_gradient(self, at: int = -1) -> float | None:
        """The norm of the weight gradient of the first layer that has one, at the observation with this index."""
        weights = self.snapshots[at].weights if self.snapshots else ()
        return next((weight.grad_norm for weight in weights if weight.grad_norm is not None), None)


@dataclass(frozen=True, repr=False)
class Trials(Shown):
    """What `try_remedies` found out. `print` shows it as a table, a notebook as a card."""

    trials: tuple[Trial, ...]
    """The trial of the untouched copy first, then one trial for each remedy."""
    notes: tuple[str, ...] = ()
    """Sentences that name the activations which no remedy could replace."""

    def __getitem__(self, remedy: str) -> Trial:
        for trial in self.trials:
            if trial.remedy == remedy:
                return trial
        raise KeyError(f"no remedy {remedy!r}; there are: {', '.join(trial.remedy for trial in self.trials)}")

    @property
    def best(self) -> Trial:
        """The trial with the lowest loss at its end, of those that help beyond doubt; where none does, of all."""
        return min(self.trials, key=lambda trial: (not self._helps(trial), *_rank(trial)))

    @property
    def cured(self) -> Trial | None:
        """The best trial; None where it is not sure that any remedy helps."""
        return self.best if self._helps(self.best) else None

    @property
    def ranked(self) -> tuple[Trial, ...]:
        """The trials in the order of the table: the untouched copy, then the lowest loss first, then what diverged or was not tried."""
        return (self.trials[0], *sorted(self.trials[1:], key=_rank))

    @property
    def in_short(self) -> str:
        """What helped most."""
        return f"of {len(self.trials) - 1} remedies: {self.summary}"

    @property
    def summary(self) -> str:
        """What helped most, in one sentence."""
        plain, best = self.trials[0], self.best
        if best is plain:
            return "no remedy gives a lower loss than the untouched copy"
        ratio = f", {percent(self._of_untouched(best) or 0.0)} of it" if self._of_untouched(best) is not None else ""
        figures = f"loss {best.loss:.3g} where the untouched copy has {plain.loss:.3g}{ratio}"
        return (
            f"{best.remedy} helps most: {figures}" if self.cured else f"no remedy surely helps: at best {best.remedy}, {figures}; too little to tell"
        )

    def code(self, remedy: str | None = None) -> str:
        """The change of a remedy as code that can be pasted: `print(trials.code())`. None: that of the best trial.

        It needs `model`, and for a learning rate `optimizer`; inputs are standardised as `x`. Make the optimizer after it has run, since it may
        replace modules. Empty where the untouched copy is the best, and for a remedy of yours without `Remedy.code`.
        """
        return (self.best if remedy is None else self[remedy]).code

    @property
    def cure(self) -> str:
        """What `try_remedies(..., apply=True)` prints: the change of the best trial as code that can be pasted, below a comment that says what it
        did. Where no trial helped, the comment alone."""
        code = self.cured.code if self.cured else ""
        missing = "; the remedy does not say its change as code" if self.cured and not code else ""
        return "\n".join([*wrapped(f"{self.summary}{missing}", PROSE, "# ", "# "), *code.splitlines()])

    def sentence(self, remedy: str) -> str:
        """What the numbers say about a remedy, compared with the untouched copy.

        A remedy helps or makes it worse where the loss at the end differs by more than 10 percent, and by more than the spreads over the seeds.
        """
        plain, trial = self.trials[0], self[remedy]
        if not trial.tried:
            return f"{remedy} was not tried: {trial.change}"
        if not math.isfinite(trial.loss):
            verdict = "makes it diverge"
        else:
            verdict = "helps" if self._helps(trial) else "makes it worse" if self._harms(trial) else "changes little"
        slopes = [f"{value:.3g}" if (value := each.worst("relative_derivative")) is not None else "?" for each in (plain, trial)]
        return (
            f"{remedy} {verdict}: loss {plain.loss:.3g} without, {trial.loss:.3g} with it; E|f'|/peak at the worst site {slopes[0]} and {slopes[1]}"
        )

    def _of_untouched(self, trial: Trial) -> float | None:
        """The loss as a share of that of the untouched copy; None for that copy, and where the share is not known."""
        plain = self.trials[0]
        known = trial is not plain and math.isfinite(trial.loss) and math.isfinite(plain.loss) and plain.loss > 0 and trial.loss >= 0
        return trial.loss / plain.loss if known else None

    def _helps(self, trial: Trial) -> bool:
        plain = self.trials[0]
        if trial is plain:
            return False
        return not math.isfinite(plain.loss) or (trial.loss < plain.loss - 0.1 * abs(plain.loss) and self._is_clear(trial))

    def _harms(self, trial: Trial) -> bool:
        plain = self.trials[0]
        return trial.loss > plain.loss + 0.1 * abs(plain.loss) and self._is_clear(trial)

    def _is_clear(self, trial: Trial) -> bool:
        """Whether the losses differ by more than their spreads over the seeds."""
        plain = self.trials[0]
        return abs(trial.loss - plain.loss) > (plain.spread or 0.0) + (trial.spread or 0.0)

    def _rows(self) -> list[Compared]:
        cured = self.cured
        return [
            Compared(
                trial.remedy,
                trial.loss if trial.tried else None,
                trial.spread,
                self._of_untouched(trial),
                trial.worst("saturated"),
                trial.worst("relative_derivative"),
                trial.first_gradient(),
                trial.change if trial.tried else f"not tried: {trial.change}",
                trial is cured,
            )
            for trial in self.ranked
        ]

    def __str__(self) -> str:
        """The table, as wide as the terminal or COLUMNS says, and what helped most."""
        page = page_for(sys.stdout).without_colours()
        hint = self.summary + ("; print(trials.code()) prints it as code" if self.cured and self.cured.code else "")
        return "\n".join([*table(self._rows(), self.notes, page), "", *wrapped(hint, page.width)])

    def _repr_html_(self) -> str:
        return card(treatment(self._rows(), self.notes, self.summary, self.cured.code if self.cured else ""))

    def plot(self) -> Figure:
        """Draw the loss, the saturated share, m, the attenuation and the gradient of the first layer over the steps with matplotlib.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from torchsat.figures import Curve, Panel, curves

        tried = [trial for trial in self.trials if trial.tried]
        return curves(
            [
                Panel(title, tuple(Curve(trial.remedy, _finite(points(trial))) for trial in tried), logarithmic)
                for title, points, logarithmic in _PANELS
            ]
        )

    def picture(self, path: str | os.PathLike[str]) -> None:
        """Draw `plot` into a file of the kind that the end of its name says."""
        self.plot().savefig(os.fspath(path), dpi=100)


def _rank(trial: Trial) -> tuple[bool, float]:
    """The sort key of trials: the lowest loss first, what diverged or was not tried last."""
    return (False, trial.loss) if math.isfinite(trial.loss) else (not trial.tried, math.inf)


Points = Iterable[tuple[int, float | None]]


def _finite(points: Points) -> tuple[tuple[int, float], ...]:
    return tuple((step, value) for step, value in points if value is not None and math.isfinite(value))


def _worst(trial: Trial, name: str) -> Points:
    return [(snapshot.step, trial.worst(name, at)) for at, snapshot in enumerate(trial.snapshots)]


_PANELS: tuple[tuple[str, Callable[[Trial], Points], bool], ...] = (
    ("loss", lambda trial: enumerate(trial.losses), True),
    ("saturated share, worst site", partial(_worst, name="saturated"), False),
    ("E|f'| / peak, worst site", partial(_worst, name="relative_derivative"), False),
    ("attenuation, worst site", partial(_worst, name="attenuation"), True),
    (
        "gradient norm, first layer",
        lambda trial: [(snapshot.step, trial.first_gradient(at)) for at, snapshot in enumerate(trial.snapshots)],
        True,
    ),
)
"""The panels of the picture: the title, how the curve of a trial is read, and whether the vertical axis is logarithmic."""
