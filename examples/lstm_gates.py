"""The gates of a character LSTM while it learns English: how many are always open, always shut, or neither.

    python examples/lstm_gates.py --picture gates.png
    python examples/lstm_gates.py --cell gru

The text is Python's own documentation, which ships with every Python (`pydoc_data.topics`). The picture is that of Karpathy, Johnson and
Fei-Fei, "Visualizing and Understanding Recurrent Networks" (2015): one circle per unit, placed by the share of characters at which its gate is
below 0.1 (x) and above 0.9 (y). On the diagonal a gate is never in between: it is a switch. At (0, 0) it is never saturated.
"""

import argparse
import logging
import shutil
from pathlib import Path
from pydoc_data.topics import topics  # type: ignore[import-not-found,unused-ignore]

import torch
from torch import Tensor, nn

import torchsat
from torchsat.replay import rnn_gates

TEXT = "\n".join(topics[name] for name in sorted(topics))
ALPHABET = sorted(set(TEXT))
GATES = {"lstm": ("input", "forget", "output"), "gru": ("reset", "update")}


class CharacterModel(nn.Module):
    def __init__(self, cell: str, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(ALPHABET), 32)
        self.rnn = {"lstm": nn.LSTM, "gru": nn.GRU}[cell](32, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, len(ALPHABET))

    def forward(self, characters: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(characters))[0])  # type: ignore[no-any-return]


def train(cell: str, log_dir: str | None, steps: int) -> tuple[CharacterModel, Tensor, list[torchsat.Snapshot], torchsat.Monitor]:
    """An ordinary loop. Returns the model, held-out text, every snapshot, and the monitor."""
    torch.manual_seed(0)
    index = {character: number for number, character in enumerate(ALPHABET)}
    data = torch.tensor([index[character] for character in TEXT])
    training, held_out = data[:-20_000], data[-20_000:]
    model, snapshots = CharacterModel(cell), list[torchsat.Snapshot]()
    with torchsat.watch(model, log_dir, sinks=[snapshots.append]) as monitor:
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for step in range(steps):
            starts = torch.randint(len(training) - 65, (32, 1))
            batch = training[starts + torch.arange(65)]
            loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % 100 == 0 or step == steps - 1:
                print(f"step {step}: {loss.item():.3f} nats per character", flush=True)
    return model, held_out, snapshots, monitor


@torch.no_grad()
def shares(model: CharacterModel, text: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """For each sigmoid gate of each layer, per unit: the share of characters below 0.1 and above 0.9."""
    sequences = text[: len(text) // 100 * 100].reshape(-1, 100)
    gates = rnn_gates(model.eval().rnn, model.embedding(sequences))
    values = {f"{gate.layer}/{gate.name}": torch.sigmoid(gate.z) for gate in gates if gate.function == "sigmoid"}
    return {name: ((value < 0.1).double().mean(0), (value > 0.9).double().mean(0)) for name, value in values.items()}


def draw(found: dict[str, tuple[Tensor, Tensor]], cell: str, path: str) -> None:
    """One panel per gate, the layers in two colours."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(GATES[cell]), figsize=(3.4 * len(GATES[cell]), 3.8), sharex=True, sharey=True, layout="constrained")
    for panel, gate in zip(panels, GATES[cell], strict=True):
        panel.plot([1, 0], [0, 1], color="0.7", linewidth=0.8)
        for layer, colour in (("l0", "#0072b2"), ("l1", "#d55e00")):
            left, right = found[f"{layer}/{gate}"]
            panel.scatter(
                left, right, s=60 * (0.15 + 0.85 * (left + right)), facecolors="none", edgecolors=colour, linewidths=0.9, label=f"layer {layer[1]}"
            )
        panel.set(title=f"{gate} gate", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal", xlabel="share of characters below 0.1")
    panels[0].set_ylabel("share of characters above 0.9")
    panels[-1].legend(frameon=False, loc="upper right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", choices=list(GATES), default="lstm")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--picture", help="draw the scatter into this file")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO)

    run = Path(f"runs/gates_{options.cell}")
    shutil.rmtree(run, ignore_errors=True)
    model, held_out, snapshots, monitor = train(options.cell, str(run), options.steps)

    print(f"\n{monitor.coverage}")
    print("\nshare of gate values below 0.1 and above 0.9 in training")
    shown = [snapshots[round(at * (len(snapshots) - 1) / 4)] for at in range(5)]
    print(" " * 20 + "".join(f"{f'step {snapshot.step}':>16}" for snapshot in shown))
    for record in shown[-1].records:
        if record.gate_left is not None:
            cells = (f"{snapshot[record.site].gate_left:.1%} {snapshot[record.site].gate_right:.1%}" for snapshot in shown)
            print(f"{record.site:20}" + "".join(f"{cell:>16}" for cell in cells))
    found = shares(model, held_out)
    print("\nunits saturated at more than 90 % of the held-out characters")
    for name, (left, right) in found.items():
        shut, opened = int((left > 0.9).sum()), int((right > 0.9).sum())
        print(f"rnn.{name:16} {shut} of {len(left)} always shut, {opened} always open")
    if options.picture:
        draw(found, options.cell, options.picture)
        print(f"\nthe picture is in {options.picture}")


if __name__ == "__main__":
    main()
