"""What watching costs: `python benchmarks/overhead.py [--device cuda] [--only MLP,GPT] [--pairs 30] [--write]`.

For each training, eager and compiled, the table gives the ratio of the time of a watched step to that of a bare step: for a step that is observed,
for a step that is not, and for a whole training with the default settings. The column "noise" gives the ratio of two bare trainings. "memory" is by
how much the highest sum of live bytes of torch's allocator within a step grows, and "kB" is the size of the event file per observation. `--write`
puts the table into docs/cost.md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from workloads import Training, Workload, compare, machine, twins, workloads

import torchsat

DOCS = Path(__file__).parent.parent / "docs" / "cost.md"
TITLES = ("training", "", "bare step", "noise", "observed step", "other steps", "default", "memory", "kB")
MODES = {"eager": None, "compiled, observed in eager": "default", "compiled, in the graph": "default"}


def peak(training: Training) -> float:
    """By how many MB the sum of live bytes of torch's allocator rises within a step, at its highest."""
    batch = training.work.batch()
    if training.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        training.step(batch)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    # The profiler does not count that a block is freed which was allocated while no profiler was on. A first step replaces these.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True):
        training.step(batch)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        training.step(batch)
    results = seen.profiler
    assert results is not None
    events = sorted((event.start_ns(), event.nbytes()) for event in results.kineto_results.events() if event.name() == "[memory]")
    live = most = 0
    for _, size in events:
        live += size
        most = max(most, live)
    return most / 1e6


def after(training: Training, monitor: torchsat.Monitor, step: int) -> None:
    """Train until the monitor has left its first steps behind, and then let it believe that this is the number of the step."""
    for _ in range(3):
        training.step(training.work.batch())
    monitor._loop.step = step


def measure(work: Workload, mode: str, device: torch.device, pairs: int) -> tuple[str, ...]:
    models = twins(work, device)

    def make() -> Training:
        return Training(work, next(models), device, MODES[mode])

    inside = "in_graph" if mode.endswith("graph") else "eager"
    # The monitor is made before any step has compiled a graph. A graph without guards on hooks would have to be compiled again.
    watched = make()
    bare = make()
    with tempfile.TemporaryDirectory() as folder:
        monitor = torchsat.watch(watched.model, folder, every=1, budget=None, compiled=inside)  # type: ignore[arg-type]
        observed = compare(bare, watched, pairs)
        extra = peak(watched) - peak(bare)
        monitor.close()
        size = sum(path.stat().st_size for path in Path(folder).rglob("*tfevents*")) / len(torchsat.read(folder)) / 1e3
    watched = make()
    with torchsat.watch(watched.model, every=10**6, budget=None, compiled=inside) as monitor:  # type: ignore[arg-type]
        after(watched, monitor, 10**6 + 5)
        other = compare(bare, watched, pairs)
    watched = make()
    with torchsat.watch(watched.model, compiled=inside) as monitor:  # type: ignore[arg-type]
        after(watched, monitor, 1075)
        whole = compare(bare, watched, max(pairs, 100), warm=0)
    noise = compare(bare, make(), pairs)
    return (
        work.name,
        mode,
        f"{observed.milliseconds:.1f} ms",
        str(noise),
        str(observed),
        str(other),
        f"{whole.total:.3f}",
        f"{extra:+.1f} MB",
        f"{size:.0f}",
    )


def rows(device: torch.device, only: list[str], modes: list[str], pairs: int) -> Iterator[tuple[str, ...]]:
    for work in workloads(device).values():
        for mode, how in MODES.items():
            # torch.compile does not trace recurrent layers, it calls their kernel. So a compiled LSTM is the same as an eager one.
            if (not only or work.name in only) and (not modes or mode in modes) and not (work.name == "LSTM" and how):
                torch._dynamo.reset()
                row = measure(work, mode, device, pairs)
                print("| " + " | ".join(row) + " |", flush=True)
                yield row


def table(titles: tuple[str, ...], found: Sequence[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (titles, ("---",) * len(titles), *found))


def put(text: str, name: str, page: Path = DOCS) -> None:
    """Put a text between the marks of this name in a page of the docs, in place of what stands there."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, rest = page.read_text().split(begin)
    page.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="names of trainings, separated by commas")
    parser.add_argument("--modes", default="", help=f"of {'; '.join(MODES)}, separated by semicolons")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    device = torch.device(given.device)
    found = list(rows(device, [name for name in given.only.split(",") if name], [mode for mode in given.modes.split(";") if mode], given.pairs))
    about = "\n".join(f"- {work.name}: {work.about}." for work in workloads(device).values())
    text = f"{machine(device)}; {given.pairs} pairs of steps each.\n\n{about}\n\n{table(TITLES, found)}"
    print("\n" + text)
    if given.write:
        put(text, f"overhead-{device.type}")


if __name__ == "__main__":
    main()
