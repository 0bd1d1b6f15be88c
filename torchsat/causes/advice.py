"""What to try against each cause; standard library only.

A remedy is a sentence. Where it can be said in code, lines follow that can be pasted as they stand: after the model and the optimizer are made and
before the training, with `model`, `optimizer` and the inputs of the training set, `x`, as names. `Cause.code` gives these lines. They treat all
layers that need it, not only those of the alert: a layer that is left as it is keeps the network from learning (`benchmarks/remedies.py` runs each of
them).

A network that came trained is never drawn anew, nor are its biases or activations changed: that would destroy what it knows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torchsat.cause import CODE_INDENT
from torchsat.causes.scene import Scene
from torchsat.expressions import attribute, gain_for, initialiser, matrix, owner, place_of, several
from torchsat.record import Record, Weight

AS_TRAINED = "nothing, if the network does its task; if not, compare the scale of its inputs with that which it was trained on"
GOOD_UPDATE = 0.01
"""A step that changes a weight by this share of itself is large, but not too large. The usual advice is 1e-3."""
_SLOWEST = 0.01
"""No advice lowers a learning rate by more than this at once."""


def with_code(sentence: str, *lines: str) -> str:
    """A remedy with code that can be pasted."""
    code = "\n".join(lines)
    return f"{sentence}:\n" + "\n".join(CODE_INDENT + line for line in code.split("\n"))


def standardise(weight: Weight, scene: Scene) -> str:
    """Against inputs with an offset or of a wrong scale.

    A feature that is constant has a deviation of 0, or of rounding errors, so it is only centred. One that is nearly constant has values of many
    deviations, which are cut off.
    """
    if scene.trained:
        return "give it inputs of the scale and the offset that it was trained on"
    return with_code(
        f"standardise the inputs by the training set, and with the same mean and std whatever else is given to {owner(weight.name)}, "
        "or put nn.BatchNorm before it",
        "# x: the inputs of the training set. What lies 5 deviations or more from the mean is cut off.",
        "mean, std = x.mean(0), x.std(0)",
        "std[std <= 1e-5 * x.abs().amax(0)] = 1",
        "x = ((x - mean) / std).clamp(-5, 5)",
    )


def shrink_inside(weight: Weight) -> str:
    """Against an input that the model itself makes too large."""
    return f"make what comes into {owner(weight.name)} smaller: the weight of a norm, an embedding, or a branch that adds up"


def draw(layers: Sequence[tuple[Record, Weight]], scene: Scene) -> str:
    """Draw weights anew, each as its activation needs it.

    Where most of the network are activations that pass little of a gradient even at their peak, no initialisation is enough, and they are replaced.
    """
    stack = flat(scene)
    if len(stack) >= 3 and {record.site for record, _ in layers} & {record.site for record in stack}:
        return rectify(
            stack,
            scene,
            f"draw the weights anew; but no initialisation lets gradients through {len(stack)} layers of {stack[0].activation}: use nn.ReLU, "
            "nn.GELU or nn.SiLU with He initialisation, or put nn.BatchNorm before each",
        )
    return with_code("draw the weights anew as their activation needs them", *_drawn(layers))


def _drawn(layers: Iterable[tuple[Record, Weight]], activation: str | None = None) -> list[str]:
    """The lines that draw these weights. `activation`: the one that they are drawn for; None: that which they feed."""
    by_call: dict[str, list[str]] = {}
    for record, weight in layers:
        by_call.setdefault(initialiser(activation or record.activation, weight.name), []).append(matrix(weight.name, weight.parameter))
    # A part of a weight is a view of it, which may be changed only where nothing is recorded for a backward.
    apart = any("chunk" in one or one.endswith("]") for found in by_call.values() for one in found)
    lines = []
    for call, found in by_call.items():
        if len(found) == 1:
            lines.append(call.format(found[0]))
        else:
            lines += [f"for weight in {several(found)}:", "    " + call.format("weight")]
    return ["with torch.no_grad():", *("    " + line for each in lines for line in each.split("\n"))] if apart else lines


def flat(scene: Scene) -> list[Record]:
    """The hidden sites whose derivative is small even at its peak, as that of a sigmoid is."""
    return [
        each for each in scene.now.records if each.peak is not None and each.peak <= 0.5 and not (each.output or each.gate) and each.kind != "softmax"
    ]


def rectify(records: Sequence[Record], scene: Scene, sentence: str | None = None) -> str:
    """Replace activations that pass little of a gradient, and draw the weights before them for what replaces them."""
    first = records[0]
    if sentence is None:
        sentence = (
            f"replace {first.activation} {place_of(first)}{f' and at {len(records) - 1} more' if len(records) > 1 else ''} by nn.ReLU, nn.GELU or "
            "nn.SiLU with He initialisation, or put nn.BatchNorm before it; Xavier and LayerNorm do not help a deep stack of sigmoids"
        )
    sites = {record.site for record in records}
    layers = [(record, weight) for record, weight in scene.layers() if record.site in sites]
    if any(record.kind != "module" for record in records) or {record.site for record, _ in layers} != sites:
        return sentence
    lines = [f"for name in {several([repr_of(site) for site in (record.site for record in records)])}:", "    model.set_submodule(name, nn.ReLU())"]
    return with_code(sentence, *lines, *_drawn(layers, "relu"))


def repr_of(text: str) -> str:
    return f'"{text}"'


def zero_biases(weights: Sequence[Weight], more: str = "") -> str:
    """Set biases to 0, that of each of these layers."""
    owners = list(dict.fromkeys(owner(weight.name) for weight in weights))
    sentence = f"set the bias of {owners[0]}{f' and of {len(owners) - 1} more layers' if len(owners) > 1 else ''} to 0{more}"
    if any(weight.parameter for weight in weights):
        return sentence
    return with_code(
        sentence,
        f"for layer in {several(owners)}:",
        "    for name, parameter in layer.named_parameters():",
        '        if "bias" in name:',
        "            nn.init.zeros_(parameter)",
    )


def leaky(records: Sequence[Record]) -> str:
    """Replace rectifiers by some that never close."""
    sentence = f"use nn.LeakyReLU, nn.ELU or nn.GELU, which do not close for ever, instead of {records[0].activation} {place_of(records[0])}"
    if any(record.kind != "module" or record.activation != "relu" for record in records):
        return sentence
    return with_code(
        f"{sentence}{f' and at {len(records) - 1} more' if len(records) > 1 else ''}",
        f"for name in {several([repr_of(record.site) for record in records])}:",
        "    model.set_submodule(name, nn.LeakyReLU(0.1))",
    )


def slower(rate: float | None, update: float) -> str:
    """Lower the learning rate so far that a step changes a weight by a hundredth of itself.

    Args:
        rate: the learning rate now; None where it is not known.
        update: by how much of itself a step has changed a weight at most.
    """
    factor = float(f"{min(0.3, max(_SLOWEST, GOOD_UPDATE / update)):.1g}")
    figures = f" from {rate:.3g} to {rate * factor:.2g}" if rate else ""
    return with_code(f"lower the learning rate{figures}, or warm it up", "for group in optimizer.param_groups:", f'    group["lr"] *= {factor:g}')


def as_before(last: int, layer: str, before: float, after: float, of_all: bool) -> str:
    """Set a learning rate that rose at once back to what it was, and begin from before it rose: dead units and nan do not come back.

    Args:
        last: the last step that was observed with the rate before.
        layer: the layer whose rate rose most.
        of_all: whether all rates rose at once. Which groups of the optimizer did is not known otherwise.
    """
    whose = "" if of_all else f" of {layer}"
    rates = f"with the learning rate{whose} at {before:.3g} and not {after:.3g}"
    sentence = f"begin again from a checkpoint of step {last} or before, {rates}, or let it rise slowly"
    return with_code(sentence, "for group in optimizer.param_groups:", f'    group["lr"] *= {before / after:.3g}') if of_all else sentence


def first_the_others() -> str:
    """Growth in a network that was wrong from the start."""
    return "remove first what was wrong from the start; if the weights still grow, lower the learning rate"


def hold(weight: Weight | None) -> str:
    """Against weights that grow slowly, by steps that are not too large."""
    place = f" of {owner(weight.name)}" if weight else ""
    return f"keep the weights{place} from growing: train with weight decay (AdamW), or put a norm before the activation"


def decay_less() -> str:
    """Against weight decay that shrinks the weights."""
    return with_code(
        "lower the weight decay, which pulls harder than the gradient", "for group in optimizer.param_groups:", '    group["weight_decay"] = 0.0'
    )


def spare_scales() -> str:
    """Against weight decay of scales."""
    return with_code(
        "give no weight decay to the weights of norms, to biases and to embeddings: put them into a group of the optimizer of their own",
        "for group in optimizer.param_groups:",
        '    if all(each.dim() < 2 for each in group["params"]):',
        '        group["weight_decay"] = 0.0',
    )


def linear_output(record: Record) -> str:
    """An output whose targets lie beyond its range."""
    sentence = f"scale the targets into the range of {record.activation}, or leave the output linear {place_of(record)}"
    if record.kind != "module":
        return sentence
    return with_code(sentence, f"model.set_submodule({repr_of(record.site)}, nn.Identity())")


def plain_logits(record: Record, loss: str) -> str:
    """An output that is bounded before a loss which takes logits. `loss`: the function of the loss that takes it."""
    path = repr_of(record.site.removesuffix("/softmax"))
    if loss == "nll_loss":
        sentence, found = (
            f"use nn.LogSoftmax instead of {record.activation} {place_of(record)}, or nn.CrossEntropyLoss without it",
            "nn.LogSoftmax(1)",
        )
    else:
        later = ", and apply it to the output where probabilities are needed" if record.activation in ("softmax", "sigmoid") else ""
        sentence, found = f"leave out {record.activation} {place_of(record)}{later}", "nn.Identity()"
    replace = f"model.set_submodule({path}, {found})"
    if record.kind == "module":
        return with_code(sentence, replace)
    if record.site.endswith("/softmax"):
        return with_code(sentence, f"if isinstance(model.get_submodule({path}), nn.Softmax):", f"    {replace}")
    return sentence


def finite_inputs() -> str:
    """Against numbers that are not finite."""
    return with_code(
        "in float16 use a GradScaler, or bfloat16, or float32 for this layer; check the inputs with torch.isfinite(x).all(), find out where what is "
        "not finite comes from, and train without it",
        "x = torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)",
    )


def with_z_loss(remedy: str) -> str:
    """Against logits of the loss that have drifted, before what else is to be tried: a z-loss (Chowdhery et al. 2022)."""
    return f"add a z-loss, 1e-4 times the mean of logsumexp(logits)^2, to the loss; {remedy}"


def smaller_logits(record: Record, layers: Sequence[tuple[Record, Weight]], scene: Scene, update: float, rate: float | None) -> str:
    """Against logits of attention that vary too much. `layers`: those that make queries and keys too large."""
    place = attribute(record.site.partition("/")[0])
    others = len({each.site for each, _ in layers} - {record.site})
    more = f" and of {others} more block{'s' if others > 1 else ''}" if others else ""
    sentence = f"normalise queries and keys of {place}{more} (nn.RMSNorm on each head)"
    if scene.trained:
        return f"{sentence}, or lower the learning rate"
    if layers:
        return with_code(f"{sentence}, or begin the training anew with smaller query and key weights", *_drawn(layers))
    return f"{sentence}, or {slower(rate, update)}" if update > GOOD_UPDATE else f"{sentence}, or draw its query and key weights smaller"


def revive(record: Record, before: Sequence[Weight], after: Sequence[Weight]) -> str:
    """Against units that fell asleep. `before`, `after`: the layers that feed the site, and those that feed the sites behind it."""
    return (
        f"recycle the dormant units {place_of(record)} from time to time (ReDo, Sokar et al. 2023): draw the weights {_of_layers(before)} that feed "
        f"them anew, set those {_of_layers(after)} that take them to 0, and empty the optimizer's moments of both. A lower rate, weight decay or "
        "LayerNorm before each activation keeps units awake. torchsat.try_remedies measures it as `revived units`, and prints its code"
    )


def _of_layers(weights: Sequence[Weight]) -> str:
    return f"of {owner(weights[0].name)}" if weights else "of the next layer"


def balance(is_sure: bool) -> str:
    """Against a router that uses few of its experts. `is_sure`: whether its probabilities are far from even."""
    large = "; its logits are large, so add a router z-loss too (1e-3 times the mean square of their logsumexp; Zoph et al. 2022)" if is_sure else ""
    return (
        "add a loss that balances the load (0.01 times E times the sum over experts of load times mean probability; Fedus et al. 2022), or a bias on "
        f"the scores that rises where an expert is idle (Wang et al. 2024){large}; give the router a lower rate, and noise while it learns. Experts "
        "that were idle for long have learned nothing: begin from before that"
    )


_CAP = 100.0
"""What QK-clip cuts the largest logit down to (Kimi Team 2025)."""


def cap_logits(record: Record, weights: Sequence[Weight], largest: float) -> str:
    """Against logits that grow. `weights`: those of queries and keys, as far as they are known. `largest`: the largest logit."""
    place = attribute(record.site.partition("/")[0])
    owners = list(dict.fromkeys(owner(weight.name) for weight in weights))
    whose = " and ".join(owners[:2]) if owners else f"its queries and keys in {place}"
    factor = math.sqrt(_CAP / largest) if largest > _CAP else 1.0
    clip = f" (QK-clip: now by {factor:.2g} each, the root of {_CAP:g} / {largest:.3g})" if factor < 1 else " (QK-clip)"
    return (
        f"normalise queries and keys of {place} (QK-norm: nn.RMSNorm on each head), or after each step scale the weights of {whose} down where the "
        f"largest logit is beyond {_CAP:g}{clip}, or lower the learning rate of these weights"
    )


def slower_there(weights: Sequence[Weight]) -> str:
    """Against weights of queries and keys that grow by steps of a sound size."""
    owners = list(dict.fromkeys(owner(weight.name) for weight in weights))
    return f"lower the learning rate of {' and '.join(owners[:2])} in a group of the optimizer of its own, or give it weight decay"


def too_large(record: Record, weight: Weight, ratio: float) -> bool:
    """Whether the gain of a layer is more than `ratio` times what suits the site that it feeds."""
    return (weight.gain or 0.0) > ratio * gain_for(record.activation)
