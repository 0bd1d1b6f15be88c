"""The values that both halves of torchsat know; standard library only.

The half that measures (torch) makes them, the half that judges, draws and reports (never torch) reads them. All are frozen. A number that
cannot be known (no gradient seen, a function without a peak, a window not yet full) is None, never 0.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal

Severity = Literal["warning", "critical"]
Tails = Literal["both", "low", "high", "none", "unknown"]
Kind = Literal["module", "call", "recurrent", "softmax"]

OCTAVES = 24
"""The histogram of the relative derivative reaches from 2^-24 to 1."""

HISTOGRAM_EDGES: tuple[float, ...] = (0.0, *(2.0**-k * half for k in range(OCTAVES, 0, -1) for half in (1.0, 1.5)), 1.0)
"""Edges of the histogram bins: the first bin is [0, 2^-24), the others split each octave in two, the last one is [0.75, 1]."""

HISTOGRAM_BINS = len(HISTOGRAM_EDGES) - 1


@dataclass(frozen=True)
class Head:
    """What is known of one head of an attention: means over the query rows that were read and see two keys or more."""

    rows: int
    entropy: float | None
    """Mean of H / ln T, T being the keys that the row sees: 1 is even attention, 0 is one key alone."""
    jacobian: float | None
    """Mean trace of the softmax Jacobian diag(p) - p p^T, which is 1 - sum p^2: 0 lets no gradient through."""
    logit_std: float | None
    """Standard deviation of the logits within a row."""
    logit_max: float | None


@dataclass(frozen=True)
class SiteFacts:
    """What is known of a site besides its numbers. It stays the same as long as the model does."""

    site: str
    activation: str
    kind: Kind
    """A module, a function call, a part of a recurrent layer, or a softmax."""
    tails: Tails
    """Which sides of the function are plateaus."""
    output: bool
    """The site makes an output of the model: saturation is what it is for, and the default rules leave it alone."""
    gate: bool
    """It multiplies another signal, which it selects by saturating (LSTM, GRU, GLU, squeeze-and-excitation): the default rules leave it alone."""
    after: tuple[str, ...]
    """The sites from which its input comes most directly, whatever layers lie between."""
    units: int | None
    """Channels or features; None where the unit axis has no fixed size."""
    normal_low: float | None
    """`low` for z ~ N(0, 1): what a healthy layer of this activation shows."""
    normal_high: float | None
    normal_derivative: float | None
    """`relative_derivative` for z ~ N(0, 1)."""


@dataclass(frozen=True)
class Record(SiteFacts):
    """What is known of one site at one observation.

    All shares lie in [0, 1]. The facts of the site come first; the measured numbers follow. At a softmax z are the logits that are not masked and a
    the probabilities; what belongs to an element-wise derivative is None there.
    """

    n: int
    """Elements measured, non-finite ones not counted. At most `sample` per call of the site."""
    elements: int
    """Elements that passed through the site."""
    saturated: float | None
    """Share of elements in a tail, where |f'| stays below epsilon of its peak."""
    low: float | None
    high: float | None
    derivative: float | None
    """E|f'(z)|."""
    derivative_rms: float | None
    """sqrt(E f'(z)^2)."""
    peak: float | None
    """sup|f'|."""
    relative_derivative: float | None
    """E|f'(z)| / peak: 1 is a fully open activation, 0 a closed one."""
    stuck: float | None
    """Share of units saturated in at least 99 % of at least 1000 samples."""
    stuck_n: int | None
    """The samples of the least sampled unit behind `stuck`."""
    z_mean: float | None
    z_std: float | None
    z_rms: float | None
    z_min: float | None
    z_max: float | None
    a_mean: float | None
    a_std: float | None
    a_min: float | None
    a_max: float | None
    gate_left: float | None
    """Share of values below 0.1, and above 0.9 (Karpathy et al. 2015); None for what is not a sigmoid."""
    gate_right: float | None
    zeros: float | None
    """Share of activations that are exactly 0."""
    nonfinite: int
    """Measured elements where z or a is inf or nan. They enter no other number."""
    grad_n: int
    """Elements at which the gradient was measured."""
    grad_nonfinite: int
    attenuation: float | None
    """||dL/dz|| / ||dL/da||: what this activation alone does to the gradient."""
    grad_a_rms: float | None
    """sqrt(mean (dL/da)^2), unscaled where a GradScaler is used."""
    grad_z_rms: float | None
    entropy: float | None = None
    """Of a softmax: the mean of `Head.entropy` and `Head.jacobian` over all rows, and the logits' standard deviation within them."""
    jacobian: float | None = None
    logit_std: float | None = None
    log_keys: float | None = None
    """Mean of ln T."""
    entropy_min: float | None = None
    """The lowest entropy of a head: the mean over heads hides a collapsed one."""
    worst: float | None = None
    """Of several ranks that observe together: the highest `saturated` of one rank alone, and that rank."""
    worst_rank: int | None = None
    nonfinite_rank: int | None = None
    """The rank on which most elements were inf or nan, if any were."""
    histogram: tuple[float, ...] | None = None
    """Share of elements per bin of HISTOGRAM_EDGES, of |f'| / peak."""
    heads: tuple[Head, ...] | None = None
    """Of a softmax; one where nothing tells heads apart."""

    @property
    def z_absmax(self) -> float | None:
        return None if self.z_min is None or self.z_max is None else max(abs(self.z_min), abs(self.z_max))


@dataclass(frozen=True)
class LayerFacts:
    """What is known of a layer that feeds a site besides its numbers. It stays the same as long as the model does."""

    name: str
    feeds: tuple[str, ...]
    """The sites that this layer's output reaches first."""
    fan_in: int
    data: bool
    """Its input is the model's: nothing that learns computed it."""


@dataclass(frozen=True)
class Weight(LayerFacts):
    """What is known of one layer that feeds a site, at one observation."""

    learning_rate: float | None
    """Of the optimizer's group that owns it."""

    n: int
    """Elements of W that were read, of which the next four are made."""
    gain: float | None
    """rms(W) * sqrt(fan_in), which is ||W||_F / sqrt(fan_out) of a linear layer: 1 under Xavier (square), sqrt(2) under He, 0.577 by default."""
    norm: float | None
    grad_norm: float | None
    """Norm of dL/dW as the optimizer received it, unscaled where a GradScaler is used."""
    update_ratio: float | None
    """||change of W by this step|| / ||W||."""
    input_rms: float | None
    input_centred_share: float | None
    """Share of the input's mean square that varies between samples; the rest is a constant offset of each feature."""
    input_n: int


@dataclass(frozen=True)
class Cause:
    """One explanation of an alert, with its share of the blame, the figures behind it and what to try."""

    name: str
    share: float
    evidence: str
    remedy: str


@dataclass(frozen=True)
class Alert:
    """A rule that fired (`firing`) or cleared (not `firing`) at a site.

    Alerts of one origin are one alert, at the first site that suffers; `also` names the others.
    """

    site: str
    rule: str
    severity: Severity
    value: float
    threshold: float
    since: int
    """The step at which the condition began."""
    step: int
    """The step of `value`."""
    firing: bool
    message: str
    causes: tuple[Cause, ...] = ()
    """Ranked; their shares add up to 1."""
    also: tuple[str, ...] = ()
    """Other sites and layers that suffer from the same, in the order of data flow."""
    rank: int | None = None
    """Of several ranks that observe together: the one where the site is worst, if one stands out."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Alert:
        known = {field.name for field in fields(Alert)}
        kept = {key: value for key, value in values.items() if key in known}
        return Alert(**{**kept, "causes": tuple(Cause(**cause) for cause in kept.get("causes", ())), "also": tuple(kept.get("also", ()))})


@dataclass(frozen=True)
class Snapshot:
    """All that was measured at one observation: records in the order in which data flows through the model."""

    step: int
    time: float
    """Seconds since the epoch, when the observation ended."""
    records: tuple[Record, ...]
    weights: tuple[Weight, ...] = ()
    alerts: tuple[Alert, ...] = ()
    """The alerts that fired or cleared at this observation."""
    overhead: float | None = None
    """The measured share of training time that the observations before this one took; None before it is known."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Snapshot:
        records = tuple(Record(**{**each, "heads": each["heads"] and tuple(Head(**head) for head in each["heads"])}) for each in values["records"])
        weights = tuple(Weight(**each) for each in values["weights"])
        return Snapshot(**{**values, "records": records, "weights": weights, "alerts": tuple(map(Alert.from_dict, values["alerts"]))})

    def __getitem__(self, site: str) -> Record:
        for record in self.records:
            if record.site == site:
                return record
        names = [record.site for record in self.records]
        near = get_close_matches(site, names, n=3) or names[:5]
        raise KeyError(f"no site {site!r} at step {self.step}; " + (f"near it: {', '.join(near)}" if near else "the snapshot is empty"))


@dataclass(frozen=True)
class Coverage:
    """What a monitor sees and what it does not."""

    seen: tuple[str, ...]
    """Sites measured at least once."""
    unseen: tuple[tuple[str, str], ...]
    """(place, reason)."""
    kinds: tuple[tuple[Kind, int], ...] = ()
    """How many of the sites seen are of which kind."""

    @property
    def described(self) -> str:
        """How many sites of which kind: `5 sites (3 modules, 2 calls)`."""
        kinds = ", ".join(f"{count} {_NOUNS[kind][count > 1]}" for kind, count in self.kinds)
        return f"{len(self.seen)} site{'' if len(self.seen) == 1 else 's'}" + (f" ({kinds})" if kinds else "")

    def __str__(self) -> str:
        rest = "nothing is known to be unseen" if not self.unseen else "not seen, or seen in part:"
        return "\n".join([f"{self.described} seen; {rest}", *(f"  {place}: {reason}" for place, reason in self.unseen)])


_NOUNS = {"module": ("module", "modules"), "call": ("call", "calls"), "recurrent": ("gate", "gates"), "softmax": ("softmax", "softmaxes")}

SITE_FACTS = tuple(field.name for field in fields(SiteFacts))
RECORD_METRICS = tuple(field.name for field in fields(Record) if field.name not in (*SITE_FACTS, "histogram", "heads"))
HEAD_METRICS = tuple(field.name for field in fields(Head))
WEIGHT_FACTS = tuple(field.name for field in fields(LayerFacts))
WEIGHT_METRICS = tuple(field.name for field in fields(Weight) if field.name not in WEIGHT_FACTS)
COUNTS = ("n", "elements", "nonfinite", "grad_n", "grad_nonfinite", "stuck_n", "worst_rank", "nonfinite_rank", "input_n", "rows")


def to_float(value: float | None) -> float:
    """None as NaN, for a tensor or a chart."""
    return math.nan if value is None else float(value)


def from_float(name: str, value: float) -> float | int | None:
    """The inverse of `to_float` for the metric of that name."""
    if math.isnan(value):
        return None
    return round(value) if name in COUNTS else value


def normal_saturated(normal_low: float | None, normal_high: float | None) -> float:
    """The share of N(0, 1) inputs that lie on a plateau, low or high, of a site's function: what is normal for `Record.saturated`.

    The arguments are `SiteFacts.normal_low` and `normal_high`. A side that is unknown counts as 0.
    """
    return (normal_low or 0.0) + (normal_high or 0.0)
