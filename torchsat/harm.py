"""Which saturation harms: the numbers of a record that the rules on plateaus judge, and their limits; standard library only.

Healthy networks saturate too. A classifier at convergence is sure, and half of the elements of a tanh layer may then lie on a plateau. How many there
are cannot tell this from a fault; what the gradient asks of them can. So two kinds of evidence are used:

- *From the start* (the first observations) nothing is learned yet. Weights of an initialisation put few elements on a plateau, so the share tells.
- *In training* saturation is judged by what it takes. `blocked` is the part of the gradient's demand sum |dL/da| that falls to elements on a plateau,
  and `trapped` the part of it that asks them to leave. At an output, where a cross-entropy makes the demand of a few wrong elements huge, each
  element counts once (`leaving`).

A layer of few units has shares that swing, so its limits are higher: by multiples of 1 / sqrt(units), as the standard error of a share falls.

Where torch hides the gradient (nn.LSTM, nn.GRU, nn.RNN), shares are all that is known, and the limits are what healthy networks do not reach.
"""

from __future__ import annotations

import math

from torchsat.experts import Experts, is_router
from torchsat.loss_functions import still_asks, takes_logits, takes_probabilities, takes_squares
from torchsat.record import Record, Snapshot, Weight, normal_saturated
from torchsat.start import LONG, Start, came_trained


def closes_both_ways(record: Record) -> bool:
    """Whether the function has two plateaus that N(0, 1) inputs mostly stay off. A ReLU6 or Hardtanh(0, k) has two, but works as a rectifier."""
    return record.tails == "both" and max(record.normal_low or 0.0, record.normal_high or 0.0) < 0.25


def normal(record: Record) -> float:
    """The saturated share that N(0, 1) inputs give."""
    return normal_saturated(record.normal_low, record.normal_high)


def is_hidden(record: Record) -> bool:
    """Whether it is a hidden layer whose function has two plateaus; not a gate, nor what makes an output."""
    return closes_both_ways(record) and not (record.output or record.gate)


def _is_linear_in_pieces(record: Record) -> bool:
    return normal(record) + (record.normal_derivative or 0.0) > 0.995


def share_at_start(record: Record, snapshot: Snapshot) -> float | None:
    """`saturated`, but not of piecewise linear functions: there it is 1 - E|f'| / peak, and healthy trained layers reach two thirds.

    Where most of what is blocked pushes on into the plateau, the layer has learned before: of what weights that know nothing block, half is trapped.
    """
    if not is_hidden(record) or _is_linear_in_pieces(record) or came_trained(snapshot):
        return None
    return 0.0 if is_content(record) else record.saturated


def share_limit(record: Record) -> float:
    """30 points more than N(0, 1) inputs give."""
    return normal(record) + 0.3


def share_limit_critical(record: Record) -> float:
    """45 points more than N(0, 1) inputs give, and no less than half."""
    return max(0.5, normal(record) + 0.45)


def slope_at_start(record: Record, snapshot: Snapshot) -> float | None:
    """E|f'| / peak."""
    if not is_hidden(record) or came_trained(snapshot):
        return None
    return 1.0 if is_content(record) else record.relative_derivative


def slope_limit(record: Record) -> float:
    """A quarter, and 45 % of what N(0, 1) inputs give."""
    return min(0.25, 0.45 * (record.normal_derivative or 1.0))


def slope_limit_critical(record: Record) -> float:
    """0.15, and 30 % of what N(0, 1) inputs give."""
    return min(0.15, 0.3 * (record.normal_derivative or 1.0))


def _news(value: float | None, record: Record, start: Start) -> float | None:
    """The value, or 0 where a layer saturates no more than the trained weights made it when the run began. Where nearly all is beyond it, as when the
    inputs have another scale than those that the network was trained on, it counts all the same."""
    before = start.item.saturated if isinstance(start.item, Record) else None
    if value is None or not start.trained or before is None or (record.saturated or 0.0) >= before + 0.15:
        return value
    return value if value >= _NEARLY_ALL else 0.0


_NEARLY_ALL = 0.9
"""From this share on a layer is saturated whatever its trained weights are for."""


def share_unseen(record: Record, snapshot: Snapshot, start: Start) -> float | None:
    """`share_at_start` in training, where no gradient is seen."""
    if not is_hidden(record) or record.kind == "recurrent" or _is_linear_in_pieces(record) or record.blocked is not None:
        return None
    return _news(record.saturated, record, start)


def slope_unseen(record: Record, snapshot: Snapshot, start: Start) -> float | None:
    """`slope_at_start` in training, where no gradient is seen."""
    if not is_hidden(record) or record.kind == "recurrent" or record.attenuation is not None:
        return None
    return record.relative_derivative if _news(record.saturated, record, start) or not record.saturated else 1.0


def blocked(record: Record, snapshot: Snapshot, start: Start) -> float | None:
    """`blocked` of a hidden layer that saturates; 0 where nearly all of it pushes on into the plateau, as in a layer that is meant to make codes of
    +-1."""
    if not is_hidden(record) or record.blocked is None or record.trapped is None:
        return None
    saturates = (record.saturated or 0.0) >= normal(record) + 0.15
    return _news(record.blocked, record, start) if saturates and not is_content(record) else 0.0


def is_content(record: Record) -> bool:
    """Whether three quarters and more of what is blocked pushes on into the plateau: most elements there are where the loss wants them."""
    return (record.trapped or 0.0) < 0.25 * (record.blocked or 0.0)


def trapped(record: Record, snapshot: Snapshot, start: Start) -> float | None:
    """`trapped` of a hidden layer that saturates."""
    found = blocked(record, snapshot, start)
    return None if found is None else record.trapped if found else 0.0


def _per_units(record: Record) -> float:
    """1 / sqrt(units)."""
    return 1 / math.sqrt(max(1, record.units or 64))


def blocked_limit(record: Record) -> float:
    """Healthy layers of 64 units stay below 0.2, and below 0.6 at a high rate; those of 8 units below 0.85."""
    return min(0.97, normal(record) + 0.5 + _per_units(record))


def blocked_limit_critical(record: Record) -> float:
    """Halfway from the limit of a warning to all."""
    return (1 + blocked_limit(record)) / 2


def trapped_limit(record: Record) -> float:
    """Healthy layers of 64 units stay below 0.06, and below 0.23 at ten times the usual rate; those of 4 units at about 0.3."""
    return min(0.9, 0.5 * normal(record) + 0.2 + 0.6 * _per_units(record))


def trapped_limit_critical(record: Record) -> float:
    """Twice the limit of a warning."""
    return 2 * trapped_limit(record)


def slope(record: Record, snapshot: Snapshot) -> float | None:
    """The larger one of E|f'| / peak and of what the activation passes of the gradient, over the peak. Both are low where the outputs of a layer have
    drifted, though few elements lie on a plateau; where many do, `blocked` and `trapped` tell. None where no gradient is seen."""
    if not is_hidden(record) or record.relative_derivative is None or record.attenuation is None or not record.peak:
        return None
    if (record.saturated or 0.0) >= share_limit(record) or is_content(record):
        return 1.0
    return max(record.relative_derivative, record.attenuation / record.peak)


def slope_limit_in_training(record: Record) -> float:
    """`slope_limit`, times 1 - 1 / sqrt(units): a mean over few units swings, and that of three units which make a code is 0.2 when it is right."""
    return slope_limit(record) * (1 - _per_units(record))


def slope_limit_critical_in_training(record: Record) -> float:
    """`slope_limit_critical`, times the same."""
    return slope_limit_critical(record) * (1 - _per_units(record))


def leaving_output(record: Record, snapshot: Snapshot) -> float | None:
    """`leaving` of what makes an output of the model."""
    return record.leaving if record.output and closes_both_ways(record) else None


def range_of_logits(record: Record, snapshot: Snapshot) -> float | None:
    """By how much the values of an output differ that the loss takes for logits, though its function bounds them.

    Two classes whose logits differ by d have probabilities in the ratio e^d, so the loss never sees an answer that is surer than that. A softmax or a
    sigmoid gives values that differ by 1 at most, and a tanh by 2. None where the loss does not take the values for logits.
    """
    is_bounded = record.kind == "softmax" or closes_both_ways(record)
    if not record.output or not is_bounded or not takes_logits(record) or record.a_max is None or record.a_min is None:
        return None
    return record.a_max - record.a_min


def beyond_range(record: Record, snapshot: Snapshot, start: Start) -> float | None:
    """The part of the demand at an output that pushes on into the plateau, where the loss squares the distance from the target. There the gradient
    falls to 0 as an output comes near to its target, so that this part is asked for by targets beyond the range of the function.

    0 where the gradient there has fallen: where all elements are sure, what little is left of it pushes them on. Targets within the range leave an
    element on a plateau no more than a twentieth of the gradient that the elements had at the first observation. 0 too where less than a tenth of
    the elements is there: outliers among the targets are no fault of the function.
    """
    first = start.item.grad_a_rms if isinstance(start.item, Record) else None
    has_plateau = closes_both_ways(record) or _is_linear_in_pieces(record)
    if not record.output or not has_plateau or not takes_squares(record) or record.kind == "softmax":
        return None
    if not first or record.grad_a_rms is None or record.blocked is None or record.trapped is None:
        return None
    return record.blocked - record.trapped if (record.saturated or 1.0) >= 0.1 and still_asks(record, first) else 0.0


def unsatisfied(record: Record, snapshot: Snapshot, start: Start) -> float | None:
    """What is left of rms dL/da since the first observation, at an output that is asked to go on where it cannot. That of a sure classifier falls
    to a half or less; targets beyond the range of the function are asked for as much as ever.

    That an output cannot go on is said of one all of which lies on one of its two plateaus, and of a rectifier whose zeros get most of the demand.
    Where both plateaus are in use, as in masks or at the actions +-1, the output does what it is asked, whatever the size of its gradient.
    """
    first = start.item.grad_a_rms if isinstance(start.item, Record) else None
    if record.kind == "softmax" or takes_probabilities(record):
        return None
    if not record.output or not first or record.grad_a_rms is None or record.blocked is None or record.trapped is None:
        return None
    is_whole = max(record.low or 0.0, record.high or 0.0) >= 0.95 and record.blocked >= 0.9
    at_end = is_whole if closes_both_ways(record) else _is_linear_in_pieces(record) and record.blocked >= 0.5
    return record.grad_a_rms / first if at_end and snapshot.step >= start.step + LONG else 0.0


_GREW = 4.0
"""Logits have grown when the largest is so many times what it was at the first observation. Those of trained weights may be large from the start."""


def logit_growth(record: Record, snapshot: Snapshot, start: Start) -> float | None:
    """The largest logit of an attention, if it has grown; 0 where it has not. None at another softmax, such as one that points at a member of a set,
    where large logits are the answer: it has one head, and its logits are made by one layer."""
    if record.kind != "softmax" or record.output or not isinstance(start.item, Record) or routes(record, snapshot):
        return None
    if len(record.heads or ()) < 2 and sum(record.site in weight.feeds and weight.spectral is not None for weight in snapshot.weights) < 2:
        return None
    now, first = (max((head.logit_max for head in each.heads or () if head.logit_max is not None), default=None) for each in (record, start.item))
    if now is None or first is None or not math.isfinite(now):
        return None
    return now if now >= _GREW * first else 0.0


def gate_with_gradient(record: Record, snapshot: Snapshot, start: Start) -> float | None:
    """`trapped` of a gate whose gradient is seen, where nearly all of its demand is blocked. A gate that is shut rightly is content."""
    if not record.gate or record.kind == "recurrent" or not closes_both_ways(record) or record.blocked is None or record.trapped is None:
        return None
    return _news(record.trapped, record, start) if record.blocked >= 0.8 and not is_content(record) else 0.0


def gate_limit(record: Record) -> float:
    """10 points more than in a hidden layer."""
    return trapped_limit(record) + 0.1


def _least_gate(record: Record, snapshot: Snapshot) -> float | None:
    """`saturated` of the least saturated sigmoid gate of a recurrent layer. It is judged at the first gate, so that a layer has one alert."""
    if record.kind != "recurrent" or record.activation != "sigmoid":
        return None
    layer = record.site.rpartition("/")[0]
    found = [each for each in snapshot.records if each.activation == "sigmoid" and each.site.rpartition("/")[0] == layer]
    return min((each.saturated for each in found if each.saturated is not None), default=None) if found[0] is record else None


def gates_at_start(record: Record, snapshot: Snapshot) -> float | None:
    """The share of the least saturated gate, before a recurrent layer has learned: untrained gates are open."""
    return None if came_trained(snapshot) else _least_gate(record, snapshot)


def gates(record: Record, snapshot: Snapshot, start: Start) -> float | None:
    """The same in training. A recurrent layer remembers by saturating, but not all of its gates at once."""
    return _news(_least_gate(record, snapshot), record, start)


def shut_at_start(record: Record, snapshot: Snapshot) -> float | None:
    """`low` of the forget gate and of the output gate of an LSTM: shut, the one keeps nothing and the other one shows nothing. (Initialisations for
    long sequences open the forget gate wide and shut the input gate. They are left alone.)"""
    is_judged = record.kind == "recurrent" and record.site.rpartition("/")[2] in ("forget", "output") and record.activation == "sigmoid"
    return record.low if is_judged and not came_trained(snapshot) else None


def hidden_state(record: Record, snapshot: Snapshot, start: Start) -> float | None:
    """`saturated` of the hidden state of an nn.RNN, of which no gradient is seen."""
    if record.kind != "recurrent" or record.gate or not closes_both_ways(record):
        return None
    return _news(record.saturated, record, start)


def closed(record: Record, snapshot: Snapshot) -> float | None:
    """`saturated` of a function with one plateau. A rectifier is sparse by design, and only closed as a whole it is faulty."""
    return record.saturated if record.tails in ("low", "high") and not record.output else None


def stuck(record: Record, snapshot: Snapshot) -> float | None:
    """`stuck`, where most of the demand falls to elements on a plateau. How many samples a unit takes is decided where it is measured
    (transport/windows.py). Healthy rectifiers have a half of their units dead, sparse codes and those at a high rate up to three
    quarters, but then the others carry the demand."""
    if record.output or record.gate or not record.units or record.stuck is None:
        return None
    is_harmful = record.blocked is None or (record.blocked >= 0.6 and not (is_hidden(record) and is_content(record)))
    return record.stuck if is_harmful else 0.0


def stuck_limit(record: Record) -> float:
    """75 % of the units, and by the 95 % bound of a share of so many units more."""
    return min(0.95, 0.75 + 1.645 * math.sqrt(0.75 * 0.25) * _per_units(record))


def stuck_limit_critical(record: Record) -> float:
    """Halfway from the limit of a warning to all."""
    return (1 + stuck_limit(record)) / 2


def dormant(record: Record, snapshot: Snapshot, start: Start) -> float | None:
    """`dormant`, where a quarter of the units have fallen asleep since the start, and most of the demand falls to elements on a plateau.

    Healthy networks let units sleep too. A sparse code has two thirds of them dormant, and an agent at a high rate three quarters, but the others
    carry the demand: 85 % of it, and 73 %, are blocked. Where a network loses its plasticity, because its targets change again and again, the part
    that is blocked comes to 90 % and more before a third of the units are dormant.
    """
    if record.output or record.gate or not record.units or record.dormant is None:
        return None
    before = start.item.dormant if isinstance(start.item, Record) else None
    has_grown = record.dormant - (before or 0.0) >= 0.25 and snapshot.step >= start.step + LONG
    return record.dormant if has_grown and (record.blocked is None or record.blocked >= 0.9) else 0.0


def dormant_limit(record: Record) -> float:
    """35 % of the units, and by the 95 % bound of a share of so many units more."""
    return min(0.95, 0.35 + 1.645 * math.sqrt(0.35 * 0.65) * _per_units(record))


def dormant_limit_critical(record: Record) -> float:
    """Halfway from the limit of a warning to all."""
    return (1 + dormant_limit(record)) / 2


def shrunk(weight: Weight, snapshot: Snapshot, start: Start) -> float | None:
    """What is left of the gain that a layer began with, where weight decay is the reason: a step is far from what the gradient makes of it, since
    decay takes away what is learned, or is all that there is. Where less than a tenth is left, the reason may be a penalty in the loss."""
    left = _left_of_gain(weight, start)
    if left is None or weight.learned_ratio is None or not weight.update_ratio:
        return None
    learned = weight.learned_ratio / weight.update_ratio
    return left if left <= 0.1 or not 0.85 <= learned <= 1.2 else 1.0


def shrunk_by_decay(weight: Weight, snapshot: Snapshot, start: Start) -> float | None:
    """What is left of the gain that a layer began with, where a decay that is added to the gradient takes 0.2 % and more off the weight in each step.
    Usual settings take a hundredth of a percent. In the equilibrium that the weight comes to, each step is nearly what the gradient makes of it."""
    left, taken = _left_of_gain(weight, start), taken_by_decay(weight)
    if left is None or taken is None:
        return None
    return left if taken >= 2e-3 else 1.0


def _left_of_gain(weight: Weight, start: Start) -> float | None:
    """The gain of a layer over the one that it began with; None for a part of a layer, and where it is not known."""
    before = start.item.gain if isinstance(start.item, Weight) else None
    return None if weight.whole is not None or not before or weight.gain is None else weight.gain / before


def faded_input(weight: Weight, snapshot: Snapshot, start: Start) -> float | None:
    """What is left of the rms of the input that a layer began with, where the model makes that input. Healthy layers keep a seventh and more, even
    those of a critic whose weights are clipped."""
    before = start.item.input_rms if isinstance(start.item, Weight) else None
    if weight.whole is not None or weight.data or not before or weight.input_rms is None:
        return None
    return weight.input_rms / before


def taken_by_decay(weight: Weight) -> float | None:
    """Learning rate x weight decay, the part of a weight that a decay which is added to the gradient g takes off it in a step, before momentum.

    With r = ||step|| and l = the gradient's part of it, both over ||W||, (r / l)^2 = 1 + (decay ||W|| / ||g||)^2 (optimizers.py). None where the
    numbers are not known.
    """
    step, learned = weight.update_ratio, weight.learned_ratio
    if not step or not learned or not weight.norm or weight.grad_norm is None or weight.learning_rate is None or not math.isfinite(step / learned):
        return None
    return weight.learning_rate * weight.grad_norm / weight.norm * math.sqrt(max(0.0, (step / learned) ** 2 - 1))


def dead_experts(experts: Experts, snapshot: Snapshot) -> float | None:
    """The share of the experts of a mixture that get less than a twentieth of an even load."""
    return None if experts.dead is None else experts.dead / experts.experts


def one_expert(experts: Experts, snapshot: Snapshot) -> float | None:
    """How far the busiest expert is on its way from an even load to one that gets every token."""
    return None if experts.dead is None else experts.concentration


def routes(record: Record, snapshot: Snapshot) -> bool:
    """Whether a softmax is that of the router of a mixture of experts."""
    return is_router(record.site, record.log_keys, snapshot.experts)


def leaving_rows(record: Record, snapshot: Snapshot) -> float | None:
    """`Head.leaving` of the head of a softmax that has most of it, of those whose demand is blocked for the most part. A head that looks at the right
    key alone has none. None where no gradient is seen, and for the router of a mixture of experts, whose load is judged."""
    if routes(record, snapshot):
        return None
    known = [(head.blocked, head.leaving) for head in record.heads or () if head.blocked is not None and head.leaving is not None]
    return max((leaving for blocked, leaving in known if blocked >= 0.55), default=0.0) if known else None
