"""The values that both halves of torchsat know; standard library only.

The half that measures needs torch and makes these values. The half that judges, draws and reports reads them, and never imports torch. All of them
are frozen. A number that cannot be known (no gradient was seen, the function has no peak, a window is not full yet) is None, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from functools import cached_property
from typing import Any, Literal, TypeVar

from torchsat.cause import Cause
from torchsat.experts import Experts
from torchsat.heads import Head as Head  # noqa: PLC0414, since others import it from here
from torchsat.ledger import Ledger
from torchsat.number_formats import FormatUse, WithFormats
from torchsat.shown import Shown, level_in_words

Severity = Literal["warning", "critical"]
Tails = Literal["both", "low", "high", "none", "unknown"]
Kind = Literal["module", "call", "recurrent", "softmax", "function"]

OCTAVES = 24
"""The histogram of the relative derivative |f'| / peak reaches from 2^-24 to 1, in this many octaves."""

HISTOGRAM_EDGES: tuple[float, ...] = (0.0, *(2.0**-k * half for k in range(OCTAVES, 0, -1) for half in (1.0, 1.5)), 1.0)
"""The edges of the bins of the histogram. The first bin is [0, 2^-24); behind it each octave is split in two, so that the last bin is [0.75, 1]."""

HISTOGRAM_BINS = len(HISTOGRAM_EDGES) - 1


@dataclass(frozen=True)
class SiteFacts:
    """What is known of a site besides its numbers. It stays the same as long as the model does."""

    site: str
    """The name of the site, such as `blocks.3.act`."""
    activation: str
    """The name of the activation function, such as `tanh`."""
    kind: Kind
    """Whether it is a module, a function call, a gate of a recurrent layer, a softmax, or a mathematical function without a plateau (`exp`)."""
    tails: Tails
    """On which sides the function has a plateau: a tail in which |f'| stays below epsilon times its peak."""
    output: bool
    """Whether the site computes an output of the model. Such a site is meant to saturate, so the default rules judge it by what its gradient asks."""
    gate: bool
    """Whether the site multiplies another signal (LSTM, GRU, GLU, squeeze-and-excitation). A gate selects by saturating, so the default rules
    have limits of their own for it."""
    after: tuple[str, ...]
    """The sites that its input comes from, with no other site between, whatever layers there are."""
    units: int | None
    """How many units (channels or features) it has; None where the unit axis has no fixed size."""
    normal_low: float | None
    """`Record.low` for z ~ N(0, 1), which is what a healthy layer of this activation shows."""
    normal_high: float | None
    """`Record.high` for z ~ N(0, 1)."""
    normal_derivative: float | None
    """`Record.relative_derivative` for z ~ N(0, 1)."""
    last: bool = field(default=False, kw_only=True)
    """Whether the output of the model is computed from it with no other site between. Where the output was not seen, as in a model that is used by
    its methods, only a site that no other one follows is known to be such a site; of a pipeline, only one in its last stage."""
    losses: tuple[str, ...] = field(default=(), kw_only=True)
    """Of an output of the model, the functions of the loss that take it, as `torch.nn.functional` calls them: `log_softmax`, which is the first half
    of `cross_entropy`, `binary_cross_entropy`, `mse_loss`, `square`, ... Behind the name stands "of scaled values" where a loss that is not of
    squares takes it shifted or scaled, and "of several signals" where it is not all that the function takes."""
    learned: bool = field(default=False, kw_only=True)
    """Whether peak and tails were learned from gradients, at the z that was seen, since no row of the table names the function."""


@dataclass(frozen=True, repr=False)
class Record(Shown, SiteFacts):
    """What was measured of one site in one observation.

    All shares lie in [0, 1]. The facts of the site come first, the measured numbers follow. z is the pre-activation and a = f(z) the activation. At a
    softmax, z are the logits that are not masked and a the probabilities; numbers that need an element-wise derivative are None there.
    """

    n: int
    """Elements that were read, without those that are inf or nan: at most `sample` per call of the site. Each stands for elements / elements read of
    its call, so that calls weigh by what they have. In an element-wise call the elements are drawn one by one, independently of what lies beside
    them; at a softmax whole rows are, and at the gates of a recurrent layer whole sequences, whose elements depend on each other."""
    elements: int
    """Elements that passed through the site, read or not."""
    saturated: float | None
    """Share of elements in a tail, where |f'| stays below epsilon times its peak."""
    low: float | None
    """Share of elements in the low tail."""
    high: float | None
    """Share of elements in the high tail."""
    derivative: float | None
    """E|f'(z)|."""
    derivative_rms: float | None
    """sqrt(E f'(z)^2)."""
    peak: float | None
    """sup|f'|."""
    relative_derivative: float | None
    """E|f'(z)| / peak. 1 is an activation that lets every gradient through, 0 one that lets none through."""
    stuck: float | None
    """Share of units that are stuck now: saturated in at least 99 % of their newest samples, counted back over observations. How many samples that
    takes, from 64 to 1000, depends on how seldom the unit was active before (transport/windows.py)."""
    stuck_n: int | None
    """The samples in which the median stuck unit has been saturated; where no unit is stuck, the samples of the least sampled one. Of earlier
    observations at most 1000 samples count."""
    z_mean: float | None
    z_std: float | None
    z_rms: float | None
    """sqrt(mean z^2)."""
    z_min: float | None
    """The smallest z of all elements, read or not; at the gates of a recurrent layer, of those that were read. The same holds for the next ones."""
    z_max: float | None
    a_mean: float | None
    a_std: float | None
    a_min: float | None
    """The smallest a of all elements; where torch never computes a (fused attention, a recurrent layer), of those that were read."""
    a_max: float | None
    gate_left: float | None
    """Share of activations below 0.1 (Karpathy et al. 2015); None where the activation is not a sigmoid."""
    gate_right: float | None
    """Share of activations above 0.9; None where the activation is not a sigmoid."""
    zeros: float | None
    """Share of activations that are exactly 0."""
    nonfinite: int
    """Elements where z or a is inf or nan, of the `inspected` ones. They enter no other number."""
    grad_n: int
    """Elements at which the gradient was measured."""
    grad_nonfinite: int
    """Elements at which the gradient is inf or nan. They enter no other number."""
    attenuation: float | None
    """||dL/dz|| / ||dL/da||: what this activation alone does to the gradient."""
    grad_a_rms: float | None
    """sqrt(mean (dL/da)^2), without the factor of a GradScaler."""
    grad_z_rms: float | None
    """sqrt(mean (dL/dz)^2), without the factor of a GradScaler."""
    blocked: float | None = None
    """How much of the demand the plateaus take: of the sum of |dL/da| over elements, the part at elements in a tail. None where no gradient was seen,
    where all of them are 0, or where it is not known which elements are in a tail. At a softmax the sum is over rows: see softmax.py."""
    trapped: float | None = None
    """The part of that sum at elements in a tail that the gradient asks to leave it: dL/da > 0 in the high tail, where descent wants a lower
    activation, and < 0 in the low one. `blocked` - `trapped` is the part that pushes on into the tail: its elements are where the loss wants them."""
    leaving: float | None = None
    """Share of elements in a tail that the gradient asks to leave. Each counts as one, however large its gradient is: a cross-entropy has so
    large a gradient at the few wrong elements of a sure classifier that `trapped` is theirs alone."""
    entropy: float | None = None
    """Mean of `Head.entropy` over the rows of all heads; None where this is no softmax."""
    jacobian: float | None = None
    """Mean of `Head.jacobian` over the rows of all heads."""
    logit_std: float | None = None
    """Standard deviation of the logits within a row, over the rows of all heads."""
    log_keys: float | None = None
    """Mean of ln T over the rows of all heads, where T is the number of keys that a row sees."""
    entropy_min: float | None = None
    """The lowest entropy of one head. A mean over heads would hide a collapsed one."""
    first_key: float | None = None
    """Mean of `Head.first_key` over the rows of all heads."""
    log_z: float | None = None
    """Mean of `Head.log_z` over the rows of all heads."""
    log_z_rms: float | None = None
    """sqrt(mean (ln Z)^2) over the rows of all heads."""
    worst: float | None = None
    """Where several ranks observe together: the highest `saturated` of one rank alone."""
    worst_rank: int | None = None
    """The rank with that share."""
    nonfinite_rank: int | None = None
    """The rank on which most elements were inf or nan, if any were."""
    dormant: float | None = None
    """Share of units that are dormant: their mean |a| is at most 0.025 of the mean over the units (Sokar et al. 2023), by at least 200 samples of
    each. Dead units are dormant too."""
    effective_rank: float | None = None
    """exp(H) of the singular values of the features, over the most that it could be, `rank_limit` (spectrum.py). None without `extras="rank"`."""
    srank: float | None = None
    """How many singular values make up 99 % of their sum (Kumar et al. 2021), over `rank_limit`."""
    rank_limit: int | None = None
    """The number of features, or that of samples if it is smaller, whose singular values these are."""
    alert_level: float | None = None
    """How near the site is to an alert, by the rule that is worst: 0 is healthy, 0.5 is at the limit of a warning, 1 at that of a critical alert
    (alert_level.py). None where no rule judges the site."""
    histogram: tuple[float, ...] | None = None
    """Share of elements in each bin of |f'| / peak; HISTOGRAM_EDGES are the edges."""
    heads: tuple[Head, ...] | None = None
    """The heads of a softmax, which is a single one where no axis is known to be that of the heads; None where this is no softmax."""

    @property
    def in_short(self) -> str:
        """The site, its activation, and how near it is to an alert."""
        return f"{self.site} ({self.activation}): {level_in_words(self.alert_level, self.nonfinite or self.grad_nonfinite)}"

    @property
    def inspected(self) -> int:
        """Elements that were looked at for inf and nan: all of them, but at the gates of a recurrent layer only those that were computed again."""
        return self.n + self.nonfinite if self.kind == "recurrent" else self.elements

    @property
    def z_absmax(self) -> float | None:
        """The largest |z|."""
        return None if self.z_min is None or self.z_max is None else max(abs(self.z_min), abs(self.z_max))


@dataclass(frozen=True)
class LayerFacts:
    """What is known of a layer that feeds a site besides its numbers. It stays the same as long as the model does."""

    name: str
    """The path of the layer, such as `blocks.3.fc1`."""
    feeds: tuple[str, ...]
    """The sites that this layer's output reaches with no other site between."""
    fan_in: int
    """How many input elements one output element is a sum of."""
    data: bool
    """Whether its input is data: nothing that learns has computed it."""
    parameter: bool = field(default=False, kw_only=True)
    """Whether `name` is the path of the parameter itself, and not of a module that has it as its `weight`."""
    layer: str = field(default="", kw_only=True)
    """What the layer is, such as `Linear 64 -> 10` or `Conv2d 3 -> 16`. Empty where `name` is the path of a parameter."""

    @property
    def titled(self) -> str:
        """The name for people. In an nn.Sequential a name such as `0` says nothing by itself: `layer 0 (Linear 64 -> 10)`."""
        return f"layer {self.name} ({self.layer})" if self.layer and self.name.rpartition(".")[2].isdecimal() else self.name


@dataclass(frozen=True, repr=False)
class Weight(Shown, LayerFacts):
    """What was measured of one layer that feeds a site, in one observation. W is its weight."""

    learning_rate: float | None
    """The learning rate of the optimizer's group that owns W."""

    n: int
    """Elements of W that were read. The next four numbers are derived from them."""
    gain: float | None
    """rms(W) * sqrt(fan_in), which for a linear layer is ||W||_F / sqrt(fan_out). Xavier's initialisation gives 1 (to a square matrix), He's sqrt(2),
    and the default of torch 0.577."""
    norm: float | None
    """||W||_F; like the next two, inf where an element is inf or nan."""
    grad_norm: float | None
    """Norm of dL/dW as the optimizer received it, without the factor of a GradScaler."""
    update_ratio: float | None
    """||change of W by this step|| / ||W||."""
    input_rms: float | None
    """sqrt(mean x^2) of the input x."""
    input_centred_share: float | None
    """Share of the input's mean square that varies between samples. The rest is a constant offset of each feature."""
    input_n: int
    """Elements of the input that were read."""
    unevenness: float | None = None
    """By how many standard errors |W| differs more between runs of 16 neighbours than it would if its elements were drawn independently. It tells
    whether W came trained: what an initialiser draws stays below 5, most trained weights lie above. Of a weight that is
    divided among ranks, that of the most uneven part. None after the first three observations."""
    learned_ratio: float | None = None
    """Like `update_ratio`, but without what weight decay did. Decoupled decay (AdamW) is subtracted element by element. Where decay is added to the
    gradient (SGD, Adam), this is the part of the step that falls to the gradient, by the norms of the two."""
    spectral: float | None = None
    """||W||_2, the largest singular value, after the step. Those of W_q and W_k bound the logits: |z| <= ||W_q|| ||W_k|| |x|^2 / sqrt(d). Known of
    weights that make logits of a softmax inside the model, where each rank holds the whole weight."""
    alert_level: float | None = None
    """Like `Record.alert_level`, of the layer."""

    @property
    def in_short(self) -> str:
        """The layer, what it is, and how near it is to an alert."""
        return f"{self.name}{f' ({self.layer})' if self.layer else ''}: {level_in_words(self.alert_level)}"

    @property
    def whole(self) -> str | None:
        """For a part of the rows of a layer's weight, such as `rnn.weight_ih_l0/forget`, the name of the layer; None for a whole layer."""
        return self.name.partition("/")[0] if "/" in self.name else None

    @property
    def learned(self) -> float | None:
        """What the step changed beside weight decay: `learned_ratio`, or `update_ratio` where that is not known."""
        return self.update_ratio if self.learned_ratio is None else self.learned_ratio

    @property
    def decays(self) -> bool:
        """Whether weight decay is known to be a part of the step."""
        return self.learned_ratio not in (None, self.update_ratio)


@dataclass(frozen=True, repr=False)
class Alert(Shown):
    """A rule that fired or cleared at a site.

    Where several sites suffer from one fault there is one alert. `site` is where the fault began, and stays the same as long as the alert fires.
    `also` names the other sites, and `worst` the one that suffers most.
    """

    site: str
    rule: str
    """The name of the rule."""
    severity: Severity
    value: float
    """The number measured at `site` that the rule compares. If the site has recovered while others still suffer, the last one beyond the limit."""
    threshold: float
    """The limit of the rule."""
    since: int
    """The step at which the condition began."""
    step: int
    """The step of the newest observation in which the alert was judged; of an event, the step at which it was told."""
    firing: bool
    """True where the rule has fired, False where the alert is over."""
    message: str
    """What is wrong, how many places suffer and since when, which is the worst, and where it began."""
    causes: tuple[Cause, ...] = ()
    """The explanations, the likeliest first."""
    also: tuple[str, ...] = ()
    """Other sites and layers that suffer from the same origin, in the order in which data flows through the model."""
    rank: int | None = None
    """Where several ranks observe together: the one where the site is worst, if one stands out."""
    worst: str | None = None
    """The site or layer that suffers most, of `site` and `also`; None where nothing but `site` suffers."""

    @property
    def in_short(self) -> str:
        """Severity, rule, place and time."""
        also = f" and {len(self.also)} more" if self.also else ""
        return f"{self.severity if self.firing else 'over'}: {self.rule} at {self.site}{also}, since step {self.since}"

    def as_dict(self) -> dict[str, Any]:
        """The alert as nested dicts and tuples of plain values."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Alert:
        """The inverse of `as_dict`, also after JSON. Fields that are not known here, of a later version, are left out."""
        kept = _known(Alert, values)
        return Alert(**{**kept, "causes": tuple(Cause(**_known(Cause, cause)) for cause in kept.get("causes", ()))})


@dataclass(frozen=True)
class Nearest:
    """The place and the rule that come nearest to the limit of a warning."""

    place: str
    """The site or the layer."""
    rule: str
    way: float
    """How much of the way to that limit has been gone: 0 is far away, 1 is at the limit or beyond it (alert_level.py)."""


@dataclass(frozen=True, repr=False)
class Snapshot(Shown, WithFormats):
    """All that was measured in one observation."""

    step: int
    """The optimizer step that was observed."""
    time: float
    """Seconds since the epoch, when the observation ended."""
    records: tuple[Record, ...]
    """The sites that ran, in the order in which data flows through the model."""
    weights: tuple[Weight, ...] = ()
    alerts: tuple[Alert, ...] = ()
    """The alerts that fired or cleared at this observation."""
    overhead: float | None = None
    """The measured share of training time that the observations before this one took; None before it is known."""
    judged: bool = True
    """Whether any rule was in use. Without one nobody knows whether the run is healthy. True of an older file, which does not say."""
    nearest: Nearest | None = None
    """What came nearest to a warning, whether or not an alert fires elsewhere; None where no value has a way to go, or in such a file."""
    ledger: Ledger | None = None
    """By what factor each part of the model changes the gradient on its way to the input; None where that was not measured."""
    experts: tuple[Experts, ...] = ()
    """The mixtures of experts whose routers have run."""

    @property
    def in_short(self) -> str:
        """The step, how much was measured, and the site or layer that is nearest to an alert."""
        items: tuple[Record | Weight, ...] = (*self.records, *self.weights)
        known = [each for each in items if each.alert_level is not None]
        worst = f"; worst: {max(known, key=lambda each: each.alert_level or 0.0).in_short}" if known else ""
        return f"of step {self.step}: {len(self.records)} sites, {len(self.weights)} layers{worst}"

    @cached_property
    def behind(self) -> dict[str, list[str]]:
        """For each site that others come after (`SiteFacts.after`), these others."""
        found: dict[str, list[str]] = {}
        for record in self.records:
            for site in record.after:
                found.setdefault(site, []).append(record.site)
        return found

    def as_dict(self) -> dict[str, Any]:
        """The snapshot as nested dicts and tuples of plain values. `formats` is left out where it is empty."""
        found = {**asdict(self), "ledger": None if self.ledger is None else self.ledger.as_dict()}
        return {name: value for name, value in found.items() if name != "formats" or value}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Snapshot:
        """The inverse of `as_dict`, also after JSON, which makes a list of each tuple. Fields that are not known here, of a later version, are left
        out."""
        records = []
        for each in values["records"]:
            known = _known(Record, each)
            heads = known.get("heads")
            records.append(Record(**{**known, "heads": None if heads is None else tuple(Head(**_known(Head, head)) for head in heads)}))
        weights = tuple(Weight(**_known(Weight, each)) for each in values.get("weights", ()))
        alerts = tuple(map(Alert.from_dict, values.get("alerts", ())))
        nearest = Nearest(**_known(Nearest, values["nearest"])) if values.get("nearest") else None
        ledger = Ledger.from_dict(values["ledger"]) if values.get("ledger") else None
        experts = tuple(Experts(**_known(Experts, each)) for each in values.get("experts", ()))
        formats = tuple(FormatUse(**_known(FormatUse, use)) for use in values.get("formats", ()))
        made = {"records": tuple(records), "weights": weights, "alerts": alerts, "nearest": nearest}
        return Snapshot(**{**_known(Snapshot, values), **made, "ledger": ledger, "experts": experts, "formats": formats})

    def __iter__(self) -> Iterator[Record]:
        """The records, in the order of `records`."""
        return iter(self.records)

    def __len__(self) -> int:
        """The number of records."""
        return len(self.records)

    def __bool__(self) -> bool:
        """True: a snapshot without records is still one."""
        return True

    def __contains__(self, site: object) -> bool:
        """Whether the site of this name ran in this observation, or whether this record is one of `records`."""
        return any(site in (record.site, record) for record in self.records)

    def __getitem__(self, site: str) -> Record:
        """The record of this site. KeyError: the site did not run in this observation."""
        for record in self.records:
            if record.site == site:
                return record
        names = [record.site for record in self.records]
        near = get_close_matches(str(site), names, n=3) or names[:5]
        raise KeyError(f"no site {site!r} at step {self.step}; " + (f"near it: {', '.join(near)}" if near else "the snapshot is empty"))


_Judged = TypeVar("_Judged", Record, Weight, Experts)


def with_levels(items: tuple[_Judged, ...], levels: Mapping[str, float]) -> tuple[_Judged, ...]:
    """Records, weights or mixtures of experts with the `alert_level` of each place, if it has one."""
    return tuple(_with(item, alert_level=levels.get(place_of(item))) for item in items)


def place_of(item: Record | Weight | Experts) -> str:
    """The name of the place that a record, a weight or a mixture of experts is of."""
    return item.name if isinstance(item, Weight) else item.site


def _with(item: _Judged, **values: Any) -> _Judged:
    # A copy of the attributes takes a twentieth of the time of `dataclasses.replace`, which calls the constructor with sixty of them.
    made = object.__new__(type(item))
    made.__dict__.update(item.__dict__, **values)
    return made


def _known(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """Those of the values that are fields of this dataclass, with a tuple for each list."""
    names = {field.name for field in fields(kind)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if name in names}


SITE_FACTS = tuple(field.name for field in fields(SiteFacts))
RECORD_METRICS = tuple(field.name for field in fields(Record) if field.name not in (*SITE_FACTS, "histogram", "heads"))
HEAD_METRICS = tuple(field.name for field in fields(Head))
WEIGHT_FACTS = tuple(field.name for field in fields(LayerFacts))
WEIGHT_METRICS = tuple(field.name for field in fields(Weight) if field.name not in WEIGHT_FACTS)
"""Names of the numbers of a Head, a Record and a Weight: what can be drawn over time. The facts are what stays the same."""
COUNTS = (
    "n",
    "elements",
    "nonfinite",
    "grad_n",
    "grad_nonfinite",
    "stuck_n",
    "worst_rank",
    "nonfinite_rank",
    "input_n",
    "rows",
    "rank_limit",
    "top_channel",
)
"""The numbers that are integers."""


def to_float(value: float | None) -> float:
    """A number for a tensor or a chart: NaN stands for None."""
    return math.nan if value is None else float(value)


def from_float(name: str, value: float) -> float | int | None:
    """The inverse of `to_float`, for the number of this name."""
    if math.isnan(value):
        return None
    return round(value) if name in COUNTS else value


def normal_saturated(normal_low: float | None, normal_high: float | None) -> float:
    """The share of N(0, 1) inputs that lie on a plateau, low or high, of a site's function: what is normal for `Record.saturated`.

    The arguments are `SiteFacts.normal_low` and `normal_high`. A side that is unknown counts as 0.
    """
    return (normal_low or 0.0) + (normal_high or 0.0)
