"""The numbers of one head of an attention; standard library only.

Those of the forward pass are of all query rows, so that the rows of an outlier token, which are few, are among them. The gradient is read at a sample
of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Head:
    """One head of an attention: means over all its query rows that see two keys or more."""

    rows: int
    """How many query rows these are."""
    entropy: float | None
    """Mean of H / ln T, where H is the entropy of the row and T the number of keys that it sees. 1 is even attention, 0 is attention to one key."""
    jacobian: float | None
    """Mean trace of the softmax Jacobian diag(p) - p p^T, which is 1 - sum p^2. 0 lets no gradient through."""
    logit_std: float | None
    """Standard deviation of the logits within a row."""
    logit_max: float | None
    """The largest logit."""
    blocked: float | None = None
    """`Record.blocked` of this head alone. Like the next two, it is of the rows at which the gradient was read."""
    trapped: float | None = None
    """`Record.trapped` of this head alone."""
    leaving: float | None = None
    """`Record.leaving` of this head alone."""
    first_key: float | None = None
    """Mean probability of the first key that the row sees: how far the head uses the first token as a sink (Xiao et al. 2023). Under a causal mask,
    even attention over T tokens gives (ln T + 0.58 - 1) / (T - 1)."""
    log_z: float | None = None
    """Mean of ln Z, where Z is the sum of exp(logit) over the keys that the row sees."""
    log_z_rms: float | None = None
    """sqrt(mean (ln Z)^2): the root of what a z-loss punishes."""
