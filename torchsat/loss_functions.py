"""What the functions of a loss, of which observe/loss.py finds the names, take from an output; standard library only."""

from __future__ import annotations

from collections.abc import Mapping

from torchsat.record import Record

OF_LOGITS: Mapping[str, str] = {
    "log_softmax": "the loss begins with log_softmax, as cross_entropy does",
    "softmax": "the loss begins with a softmax",
    "logsumexp": "the loss begins with logsumexp, as a distribution over classes does that is given logits",
    "nll_loss": "nll_loss takes logarithms of probabilities",
    "binary_cross_entropy_with_logits": "binary_cross_entropy_with_logits applies a sigmoid itself",
    "logsigmoid": "the loss begins with logsigmoid",
    "soft_margin_loss": "soft_margin_loss applies a sigmoid itself",
}
"""They take logits, or logarithms of probabilities. With each comes what it does to them, as it is told."""
OF_PROBABILITIES = ("binary_cross_entropy",)
"""They take probabilities."""
OF_SQUARES = ("mse_loss", "huber_loss", "smooth_l1_loss", "square")
"""They square the distance from a target. Huber's loss grows with the distance alone beyond its middle."""


def takes_logits(record: Record) -> bool:
    """Whether a function of the loss takes an output for logits."""
    return not set(OF_LOGITS).isdisjoint(record.losses)


def takes_probabilities(record: Record) -> bool:
    """Whether a function of the loss takes an output for probabilities. Its gradient is -1 / p at the probability p of what is right, and does not
    fall below 1."""
    return not set(OF_PROBABILITIES).isdisjoint(record.losses)


def takes_squares(record: Record) -> bool:
    """Whether the loss squares the distance of an output from a target, and nothing else takes the output. Its gradient is 0 where the target is
    reached."""
    return bool(record.losses) and set(record.losses) <= set(OF_SQUARES)


def still_asks(record: Record, first: float) -> bool:
    """Whether an element on a plateau that is asked to go on there still gets a quarter of `first`, the gradient rms that the elements of the site
    had at the first observation. Under a loss of squares, targets within the range leave it no more than a twentieth."""
    if record.blocked is None or record.trapped is None or record.grad_a_rms is None:
        return False
    return (record.blocked - record.trapped) / (record.saturated or 1.0) * record.grad_a_rms >= 0.25 * first
