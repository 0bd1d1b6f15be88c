"""The loss of my transformer does not go down: does its attention collapse?

    python examples/transformer.py                  a small GPT with a learning rate that is far too high
    python examples/transformer.py --sane           the same with a warm-up and a rate that suits it
    python examples/transformer.py --log runs/gpt   writes for TensorBoard, too

With the high rate the logits of the attention grow until each query looks at one key only. Its softmax then lets no gradient through, and the loss
stays where it is. The text is Python's own documentation, which ships with every Python.
"""

import argparse
import logging
from collections.abc import Callable
from pydoc_data.topics import topics  # type: ignore[import-not-found,unused-ignore]

import torch
from torch import Tensor, nn

import torchsat

TEXT = "\n".join(topics[name] for name in sorted(topics))
ALPHABET = sorted(set(TEXT))
LENGTH = 64


class Block(nn.Module):
    """Attention and a network of two layers, each behind a norm and added to what comes in."""

    def __init__(self, width: int, heads: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), activation(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class GPT(nn.Module):
    def __init__(self, width: int = 64, depth: int = 4, heads: int = 4, activation: Callable[[], nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(len(ALPHABET), width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, heads, activation) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(ALPHABET))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place(torch.arange(tokens.shape[1]))
        out: Tensor = self.head(self.norm(self.blocks(x)))
        return out


def train(sane: bool, steps: int, log_dir: str | None = None) -> tuple[float, torchsat.Monitor]:
    """An ordinary training loop. Returns the mean loss of its last tenth, and the monitor."""
    torch.manual_seed(0)
    place = {character: at for at, character in enumerate(ALPHABET)}
    text = torch.tensor([place[character] for character in TEXT[:200_000]])
    model = GPT()
    monitor = torchsat.watch(model, log_dir, every=10)
    rate = 2e-3 if sane else 0.1
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=30 if sane else 1)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(text) - LENGTH - 1, (16, 1))
        batch = text[starts + torch.arange(LENGTH + 1)]
        loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warm_up.step()
        losses.append(loss.item())
    monitor.close()
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last), monitor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sane", action="store_true", help="use a warm-up and a rate that suits the model")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--log", help="the directory to write for TensorBoard")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO)

    loss, monitor = train(options.sane, options.steps, options.log)
    print(f"\nloss at the end: {loss:.2f} (the logarithm of the alphabet is {torch.tensor(float(len(ALPHABET))).log():.2f})")
    print(f"the verdict: {monitor.verdict}")
    if monitor.verdict.advice:
        print(f"try: {monitor.verdict.advice}")


if __name__ == "__main__":
    main()
