"""How far the activations of healthy networks saturate when the networks are trained to convergence. The limits of the rules lie beyond these values.

    python benchmarks/healthy.py

The networks have three hidden layers of 128 units and learn the digits of scikit-learn, with standardised inputs and with the initialisation of
Xavier or He. No alert may fire where the network has learned; three layers of hardsigmoids do not under SGD, and their gradient vanishes indeed.
"""

from collections.abc import Callable, Iterator

import torch
from sklearn.datasets import load_digits
from torch import nn

import torchsat

ACTIVATIONS = (nn.Tanh, nn.Sigmoid, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid, nn.ReLU, nn.ReLU6, nn.GELU, nn.ELU, nn.SELU)
OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]] = {
    "Adam 1e-3": lambda parameters: torch.optim.Adam(parameters, 1e-3),
    "SGD 0.05": lambda parameters: torch.optim.SGD(parameters, 0.05),
}


def main() -> None:
    torch.set_num_threads(1)
    pixels, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    pixels = (pixels.float() - pixels[:1500].float().mean(0)) / (pixels[:1500].float().std(0) + 1e-3)
    print(f"torch {torch.__version__}\n\nactivation   optimizer  accuracy  most saturated  least E|f'|/peak  most stuck  alerts")
    for activation in ACTIVATIONS:
        for name, make in OPTIMIZERS.items():
            torch.manual_seed(0)
            layers: list[nn.Module] = []
            for width in (64, 128, 128):
                linear = nn.Linear(width, 128)
                initialise = nn.init.kaiming_normal_ if activation in (nn.ReLU, nn.ReLU6, nn.GELU) else nn.init.xavier_normal_
                initialise(linear.weight)
                layers += [linear, activation()]
            model = nn.Sequential(*layers, nn.Linear(128, 10))
            snapshots: list[torchsat.Snapshot] = []
            alerts: list[torchsat.Alert] = []
            optimizer = make(model.parameters())
            with torchsat.watch(model, budget=None, sinks=(snapshots.append,), on_alert=alerts.append):
                for _ in range(1500):
                    batch = torch.randint(1500, (64,))
                    loss = nn.functional.cross_entropy(model(pixels[batch]), labels[batch])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
            with torch.no_grad():
                accuracy = (model(pixels[1500:]).argmax(1) == labels[1500:]).float().mean().item()
            records = [record for snapshot in snapshots for record in snapshot.records]
            print(
                f"{activation.__name__:12} {name:9}  {accuracy:8.1%}  {max(r.saturated for r in records if r.saturated is not None):14.3f}"
                f"  {min(r.relative_derivative for r in records if r.relative_derivative is not None):16.3f}"
                f"  {max(r.stuck or 0 for r in records):10.3f}  {len(alerts):6d}"
            )


if __name__ == "__main__":
    main()
