"""Every nonlinear operator that 53 architectures outside of transformers run is a site, or is named in coverage.

docs/architectures.py builds them, and compares with what a dispatch mode hears below autograd.
"""

import dataclasses

import pytest

from tests.scripts import load

architectures = load("docs", "architectures")
ALL = {each.name: each for each in architectures.ARCHITECTURES}
SITES = {
    "SIREN": {"1": "sin", "3": "sin"},
    "Mamba": {"silu": "silu", "softplus": "softplus", "exp": "exp", "silu_1": "silu"},
    "RWKV": {"sigmoid": "sigmoid", "exp": "exp", "relu": "relu", "square": "square"},
    "Soft caps": {"tanh": "tanh", "softmax": "softmax", "tanh_1": "tanh"},
    "gpt-oss block": {"clamp": "clamp", "clamp_1": "clamp", "sigmoid": "sigmoid"},
    "Gumbel-softmax VAE": {"encoder.1": "relu", "gumbel_softmax": "softmax", "decoder.1": "relu"},
    "Vocoder": {"1": "snake", "3": "snake", "5": "tanh"},
    "World model": {"abs": "abs", "log1p": "log1p", "body.1": "silu", "abs_1": "abs", "expm1": "expm1"},
}


@pytest.mark.parametrize("name", ALL)
def test_every_nonlinear_operator_is_a_site_or_is_named(name: str) -> None:
    seen = architectures.observe(ALL[name])
    assert seen.unaccounted == ()
    assert seen.operators or name == "Maxout"
    for record in seen.snapshot.records if seen.snapshot is not None else ():
        assert record.n > 0
        assert record.nonfinite == 0
        assert record.derivative is not None or record.kind == "softmax"
        # The first layer of the KAN begins with functions of data.
        assert record.grad_n > 0 or record.kind in ("softmax", "recurrent") or (name == "KAN" and record.site in ("relu", "silu"))
    page = architectures.PAGE.read_text().splitlines()
    if architectures.versions() in page:
        assert architectures.row(ALL[name], seen) in page, "docs/architectures.md is old: run `python docs/architectures.py`"
    if name in SITES:
        assert {record.site: record.activation for record in seen.snapshot.records} == SITES[name]


def test_the_test_above_can_fail() -> None:
    assert architectures.observe(ALL["Mamba"], calls=False).unaccounted == (("", "exp"), ("", "silu"), ("", "softplus"))
    without = dataclasses.replace(ALL["Capsules"], normalises=frozenset())
    assert ("", "sqrt") in architectures.observe(without).unaccounted
    assert architectures.observe(ALL["Spiking network"], calls=False).unaccounted == (("", architectures.CUSTOM),)


def test_there_are_forty_and_the_page_has_them() -> None:
    rows = [line.split(" | ") for line in architectures.PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    assert [row[0].removeprefix("| ") for row in rows] == list(ALL)
    assert {row[-1] for row in rows} == {"0 |"}
    assert len(ALL) >= 40


def test_a_list_of_linear_operators_names_no_function() -> None:
    """The list of the page decides what need not be seen, so that nothing may slip into it."""
    for name in (
        "exp",
        "sin",
        "pow",
        "sigmoid",
        "tanh",
        "relu",
        "topk",
        "cumprod",
        "div",
        "clamp",
        "maximum",
        "abs",
        "sqrt",
        "erf",
        "log",
        "_softmax",
    ):
        assert not architectures.LINEAR.fullmatch(name)
