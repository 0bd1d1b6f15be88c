"""What the functions of a loss, of which observe/loss.py finds the names, take from an output; standard library only."""

from __future__ import annotations

from torchsat.record import Record

OF_LOGITS = ("log_softmax", "softmax", "logsumexp", "nll_loss", "binary_cross_entropy_with_logits", "logsigmoid", "soft_margin_loss")
"""They take logits, or logarithms of probabilities. `cross_entropy` is `log_softmax` and `nll_loss`."""
OF_PROBABILITIES = ("binary_cross_entropy",)
"""They take probabilities."""
OF_SQUARES = ("mse_loss", "huber_loss", "smooth_l1_loss", "pow")
"""They square the distance from a target. Huber's loss grows with the distance alone beyond its middle."""


def takes_logits(record: Record) -> bool:
    """Whether a function of the loss takes an output for logits."""
    return not set(OF_LOGITS).isdisjoint(record.losses)


def takes_probabilities(record: Record) -> bool:
    """Whether a function of the loss takes an output for probabilities. Its gradient is -1 / p at the probability p of what is right, and does not
    fall below 1."""
    return not set(OF_PROBABILITIES).isdisjoint(record.losses)


def takes_squares(record: Record) -> bool:
    """Whether a function of the loss squares the distance of an output from a target. Its gradient is 0 where the target is reached."""
    return not set(OF_SQUARES).isdisjoint(record.losses)
