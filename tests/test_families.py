"""Every activation that the architectures of Hugging Face transformers compute is a site, or is named in coverage.

What they compute is found by other means than torchsat's: a dispatch mode sees every operator of aten, below autograd, and a stack of the
test's own says in which module.
"""

import os
import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import torchsat
from tests.scripts import load
from tests.truth import known
from torchsat.functions import NAMES

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")

families = load("docs", "families")

OPERATORS = re.compile(
    r"aten\.(sigmoid|tanh|relu|leaky_relu|prelu\w*|rrelu\w*|elu|celu|gelu|silu|mish|softplus|hardtanh|hardsigmoid|hardswish|log_sigmoid\w*|"
    r"softshrink|hardshrink|threshold|_softmax|glu|_scaled_dot_product\w*|\w*attention_forward)_?\.\w+"
)


class Operators(TorchDispatchMode):
    """(path of the innermost module, operator) of every activation that runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack: list[str] = []
        self.met: set[tuple[str, str]] = set()
        for path, module in model.named_modules():
            module.register_forward_pre_hook(lambda module, args, path=path: self.stack.append(path))
            module.register_forward_hook(lambda module, args, output: (self.stack.pop(), None)[1])

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = OPERATORS.fullmatch(str(function))
        if found:
            self.met.add((self.stack[-1], found[1]))
        return function(*args, **(kwargs or {}))


def missing(name: str, **options: Any) -> list[tuple[str, str]]:
    """What ran and is neither a site nor named."""
    model, inputs = families.build(name)
    operators = Operators(model)
    random = torch.get_rng_state()
    with operators, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(**inputs)
    assert operators.met
    model, inputs = families.build(name)
    torch.set_rng_state(random)
    with torchsat.watch(model, errors="raise", **options) as monitor, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        families.loss_of(model(**inputs)).backward()
        monitor.step()
    assert monitor.latest is not None
    table = {*(row.name for row in torchsat.ACTIVATIONS), "softmax", "quick_gelu", "squared_relu", *NAMES}
    assert {record.activation for record in monitor.latest.records} <= table
    for record in monitor.latest.records:
        if record.activation == "gelu":
            # The range in which the activations of a trained network run. A normalisation in front of one sets it to 1.
            assert known(record.z_std) > 0.99
            assert known(record.z_max) > 3
            assert known(record.z_min) < -3
    named = {*monitor.coverage.seen, *(place for place, _ in monitor.coverage.unseen)}
    for record in monitor.latest.records:
        assert record.n > 0
        assert record.nonfinite == 0
    return [(path, what) for path, what in operators.met if not any(place == path or place.rpartition("/")[0] == path for place in named)]


@pytest.mark.parametrize("name", [row[0] for row in families.FAMILIES])
def test_every_activation_in_the_source_is_a_site_or_is_named(name: str) -> None:
    assert missing(name) == []


def test_the_test_above_can_fail() -> None:
    assert ("model.layers.0.self_attn", "_scaled_dot_product_flash_attention_for_cpu") in missing("Llama", calls=False)


def test_the_count_of_families_and_those_that_must_be_there() -> None:
    names = {row[0] for row in families.FAMILIES}
    wanted = "BERT GPT-2 Llama Mistral T5 ViT ConvNeXt Swin Whisper CLIP Mamba RWKV Mixtral DeBERTa Falcon Gemma GPT-NeoX OPT BLOOM DistilBERT ALBERT"
    assert {*wanted.split(), "Qwen 2", "wav2vec 2.0", "ELECTRA", "SegFormer"} <= names
    assert len(names) >= 25
