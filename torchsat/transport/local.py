"""The transport of a process that observes by itself."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from torchsat.parts import Parts
from torchsat.transport.flight import Flight, copy_to_host
from torchsat.transport.layout import Layout
from torchsat.transport.packing import Ends, Numbers, pack, unpack
from torchsat.transport.windows import UnitWindows


class Local:
    """Copies what one process measured to its host.

    A model can be spread over several devices. Each device then packs what lies on it in the layout of the whole, and the host merges the copies,
    as ranks merge theirs: nothing is copied between devices, where it could be read before it has arrived.
    """

    def __init__(self) -> None:
        self.windows = UnitWindows()
        self._generation: int | None = None
        """The structure of the model (`Parts.generation`) for which the windows have been added up."""

    def send(self, step: int, parts: Parts) -> Flight | None:
        """Start the copy of one observation; None where no site ran."""
        if parts.is_empty:
            return None
        layout, ends = Layout.of(parts), Ends(step, step)
        copies = [copy_to_host(pack(here, layout, device, ends)) for device, here in _by_device(parts, layout).items()]
        return Flight(step, time.time(), layout, copies, averages=parts.averages, generation=parts.generation)

    def read(self, flight: Flight) -> Numbers:
        """The numbers of a flight that has arrived. Flights are to be read in the order in which they were sent."""
        if flight.generation != self._generation:
            self._generation = flight.generation
            self.windows.start_over()
        numbers = unpack(flight.merged(), flight.layout, self.windows)
        return replace(numbers, scale=numbers.scale * flight.averages)


def _by_device(parts: Parts, layout: Layout) -> dict[torch.device, Parts]:
    """The parts that are on each device. The devices of the loss scale and of the overflow flag count too, since no site may be on them."""
    rows = {name: part.row.device for name, part in parts.sites.items() if name in layout.sites and part.row is not None}
    numbers = {name: part.numbers.device for name, part in parts.layers.items() if name in layout.layers and part.numbers is not None}
    tallied = {key: part.sums.device for key, part in parts.tallies.items() if part.sums is not None}
    scale, skipped = (None if flag is None else flag.device for flag in (parts.scale, parts.skipped))
    found = {device: parts for device in (*rows.values(), *numbers.values(), *tallied.values(), scale, skipped) if device is not None}
    if len(found) == 1:
        return found
    return {
        device: replace(
            parts,
            sites={name: part for name, part in parts.sites.items() if rows.get(name) == device},
            layers={name: part for name, part in parts.layers.items() if numbers.get(name) == device},
            tallies={key: part for key, part in parts.tallies.items() if tallied.get(key) == device},
            scale=parts.scale if scale == device else None,
            skipped=parts.skipped if skipped == device else None,
        )
        for device in found
    }
