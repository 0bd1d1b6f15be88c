"""My agent always does the same: is its policy stuck at the bounds of its actions?

    python examples/rl_agent.py           a policy whose tanh sits at its bounds from the start
    python examples/rl_agent.py --sane    the same policy with observations in metres and a small last layer

The agent pushes a cart along a line so that it comes to rest at the middle; the environment is these few lines. Position and speed come in
millimetres, so the observations are in the thousands. tanh(1000) is 1, and its derivative is 0: whatever the agent sees, it pushes with all its
force, and no gradient can change that. The policy learns by descent on what the episode costs, since this environment has a derivative.
"""

import argparse
import logging

import torch
from torch import Tensor, nn

import torchsat


class Policy(nn.Module):
    """From position and speed to a force between -1 and 1."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.mean = nn.Linear(width, 1)
        self.force = nn.Tanh()

    def forward(self, seen: Tensor) -> Tensor:
        force: Tensor = self.force(self.mean(self.body(seen)))
        return force


def cost(policy: nn.Module, unit: float, carts: int = 64, moments: int = 30) -> Tensor:
    """The mean square of the position in metres over an episode, for carts that begin at random places. `unit`: of it a metre has so many."""
    position, speed, total = 4 * torch.rand(carts, 1) - 2, torch.zeros(carts, 1), torch.zeros(())
    for _ in range(moments):
        force = policy(unit * torch.cat([position, speed], 1))
        speed = 0.9 * speed + 0.3 * force
        position = position + 0.3 * speed
        total = total + position.square().mean()
    return total / moments


def train(sane: bool, steps: int, log_dir: str | None = None) -> tuple[float, torchsat.Monitor]:
    """Returns what the last episodes cost, and the monitor."""
    torch.manual_seed(0)
    policy = Policy()
    if sane:
        nn.init.normal_(policy.mean.weight, std=0.01)
    monitor = torchsat.watch(policy, log_dir, every=10)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    costs = []
    for _ in range(steps):
        loss = cost(policy, 1.0 if sane else 1000.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        costs.append(loss.item())
    monitor.close()
    last = costs[-max(1, steps // 10) :]
    return sum(last) / len(last), monitor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sane", action="store_true", help="observe in metres, and begin with small forces")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--log", help="the directory to write for TensorBoard")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO)

    found, monitor = train(options.sane, options.steps, options.log)
    print(f"\nthe last episodes cost {found:.2f}; an agent that does nothing pays 1.33")
    print(f"the verdict: {monitor.verdict}")
    if monitor.verdict.advice:
        print(f"try: {monitor.verdict.advice}")


if __name__ == "__main__":
    main()
