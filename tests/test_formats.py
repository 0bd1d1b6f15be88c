"""What number formats would do to elements: counted as torch's own casts round them."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from torchsat.columns import FORMATS as COLUMNS
from torchsat.formats import BLOCK, count, limits
from torchsat.number_formats import BY_NAME, FORMATS, FormatUse, NumberFormat

PLAIN = [known for known in FORMATS if known.block == 1]
KINDS = ("flushed", "smallest", "subnormal", "clamped")
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def columns(x: Tensor, limit: int | None = None, seed: int = 0) -> dict[str, dict[str, float]]:
    """What is counted of a tensor: for each format, the columns by name."""
    found = count(x, limit, seed).T.tolist()
    return {known.name: dict(zip(COLUMNS.sums, each, strict=True)) for known, each in zip(FORMATS, found, strict=True)}


def by_cast(x: Tensor, known: NumberFormat) -> dict[str, Tensor]:
    """What torch's own cast does to each element of float32."""
    cast, size = x.to(getattr(torch, known.dtype)).double().abs(), x.double().abs()
    # Of the four formats e4m3 alone has no infinity. Beyond 464, the middle, newer versions of torch clamp, and older ones give nan.
    beyond = ~cast.isfinite() | (size > 464) if known.name == "fp8_e4m3" else cast.isinf()
    if known.name == "fp8_e4m3":
        assert set(cast[size > 464].unique().tolist()) <= {448.0} or cast[size > 464].isnan().all()
    kept = ~beyond & (cast > 0)
    return {
        "flushed": (size > 0) & (cast == 0),
        "smallest": kept & (cast == known.smallest),
        "subnormal": kept & (cast < known.smallest_normal),
        "clamped": beyond,
    }


def every_value() -> Tensor:
    """Every finite value of float16 and of bfloat16, and for each limit of each format the float32 around it."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    values = [bits.view(torch.float16).float(), bits.view(torch.bfloat16).float()]
    for known in PLAIN:
        edges = torch.tensor([*limits(known), *(torch.tensor([known.smallest_normal, known.largest]).view(torch.int32).tolist())], dtype=torch.int32)
        near = (edges[:, None] + torch.arange(-300, 301, dtype=torch.int32)).clamp(min=0)
        values += [near.view(torch.float32).reshape(-1), -near.view(torch.float32).reshape(-1)]
    generator = torch.Generator().manual_seed(1)
    values.append(torch.randint(-(2**31), 2**31 - 1, (2**16,), generator=generator).to(torch.int32).view(torch.float32))
    joined = torch.cat(values)
    return joined[joined.isfinite()]


@pytest.mark.parametrize("known", PLAIN, ids=lambda known: known.name)
def test_each_element_is_told_as_torch_casts_it(known: NumberFormat) -> None:
    x = every_value()
    expected = by_cast(x, known)
    bits, (kept, larger, normal, clamped) = x.view(torch.int32) & 0x7FFFFFFF, limits(known)
    ours = {
        "flushed": (bits > 0) & (bits < kept),
        "smallest": (bits >= kept) & (bits < larger),
        "subnormal": (bits >= kept) & (bits < normal),
        "clamped": bits >= clamped,
    }
    found = columns(x)[known.name]
    for kind in KINDS:
        assert torch.equal(ours[kind], expected[kind]), kind
        assert found[kind] == int(expected[kind].sum()) > 0, kind
    assert found["n"] == found["read"] == len(x)
    assert found["zero"] == int((x == 0).sum()) > 0


@pytest.mark.parametrize("known", PLAIN, ids=lambda known: known.name)
def test_the_table_has_the_numbers_of_torch(known: NumberFormat) -> None:
    told = torch.finfo(getattr(torch, known.dtype))
    assert (known.largest, known.smallest_normal, known.smallest) == (told.max, told.smallest_normal, told.smallest_normal * told.eps)


def test_one_element_at_each_limit_is_counted_alone() -> None:
    for known in PLAIN:
        for limit in limits(known):
            for bits in (limit - 1, limit):
                x = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
                if x.isfinite():
                    assert {kind: columns(x)[known.name][kind] for kind in KINDS} == {kind: float(flag) for kind, flag in by_cast(x, known).items()}


def nearest(size: float, values: list[float]) -> float:
    """The nearest of these values, which rise from 0 and continue beyond the last; from the middle the one of even index."""
    at = min(range(len(values)), key=lambda at: (abs(values[at] - size), at % 2))
    return values[at]


def mx_reference(x: Tensor) -> dict[str, int]:
    """mxfp8 of rows of blocks in float64, by the rule of the OCP specification and the list of the values of e4m3."""
    normal = [2.0**e * (1 + m / 8) for e in range(-6, 9) for m in range(8)]
    values = [m * 2.0**-9 for m in range(8)] + normal
    assert len(values) == 128
    assert values[-2:] == [448.0, 480.0]
    counts = dict.fromkeys(KINDS, 0)
    for block in x.double().abs().reshape(-1, 32).tolist():
        largest = max(block)
        scale = 2.0 ** (math.floor(math.log2(largest)) - 8) if largest else 1.0
        for size in block:
            result = nearest(min(size / scale, 480.0), values)
            counts["clamped"] += result > 448
            counts["flushed"] += size > 0 and result == 0
            counts["subnormal"] += 0 < result < 2.0**-6
            counts["smallest"] += result == 2.0**-9
    return counts


def nvfp4_reference(x: Tensor) -> dict[str, int]:
    """nvfp4 of rows of blocks: the scales in float32 with torch's own cast to e4m3, the elements rounded by the list of the values of e2m1."""
    whole = x.abs().max() / (448 * 6)
    blocks = x.reshape(-1, 16)
    scales = (blocks.abs().amax(1, keepdim=True) / 6 / whole).clamp(2.0**-6, 448).to(torch.float8_e4m3fn).float()
    # torchao multiplies by the reciprocal in float32, which decides in the middle of two values.
    scaled = blocks.abs() * ((1 / whole) / scales)
    counts = dict.fromkeys(KINDS, 0)
    for block, of_block in zip(blocks.abs().tolist(), scaled.double().tolist(), strict=True):
        for size, units in zip(block, of_block, strict=True):
            result = nearest(units, [*E2M1, 8.0])
            counts["clamped"] += result > 6
            counts["flushed"] += size > 0 and result == 0
            counts["subnormal"] += result == 0.5
            counts["smallest"] += result == 0.5
    return counts


@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0, 6.0])
def test_block_scaled_formats_are_told_as_a_reference_in_float64_rounds(spread: float) -> None:
    """With torchao 0.18 at hand, `to_mx` and `nvfp4_quantize` gave the same counts for 400 tensors like these."""
    torch.manual_seed(int(spread))
    x = torch.randn(8, 64) * torch.exp2(torch.randn(8, 64) * spread) * torch.exp2(8 * torch.rand(8, 1) - 12)
    x[:, ::9] = 0
    found = columns(x)
    assert {kind: found["mxfp8"][kind] for kind in KINDS} == mx_reference(x)
    assert {kind: found["nvfp4"][kind] for kind in KINDS} == nvfp4_reference(x)
    assert found["nvfp4"]["flushed"] > 0
    assert found["mxfp8"]["flushed" if spread > 1 else "clamped"] > 0


def test_blocks_by_hand() -> None:
    # The largest element of the tensor is 5.25 = 6 x 448 / 512, so that the scale of the second block of nvfp4, whose largest element is 3, is
    # exactly 1 / 2: in its units 0.25 lies in the middle and becomes 0, 0.75 becomes 1, and 5 becomes 4.
    x = torch.tensor([[5.25, *[1.0] * 15, 3.0, 0.125, 0.1250001, 0.375, 0.3749999, 2.5, 0.0, 1e-9, *[1.0] * 8]])
    found = columns(x)
    assert found["nvfp4"] == {"n": 32, "read": 32, "zero": 1, "flushed": 2, "smallest": 2, "subnormal": 2, "clamped": 0}
    # The scale of mxfp8 is 2^(2 - 8): flushed is what is 2^-16 or less, clamped what is above 464 / 64 = 7.25.
    assert found["mxfp8"] == {"n": 32, "read": 32, "zero": 1, "flushed": 1, "smallest": 0, "subnormal": 0, "clamped": 0}
    x[0, :3] = torch.tensor([7.5, 7.25, 2.0**-16 * 1.0001])
    assert columns(x)["mxfp8"] == {"n": 32, "read": 32, "zero": 1, "flushed": 1, "smallest": 1, "subnormal": 1, "clamped": 1}


def test_a_power_of_two_changes_nothing_in_a_block_scaled_format() -> None:
    x = torch.randn(4, 96) * torch.exp2(4 * torch.randn(4, 96))
    for exponent in (-40, -3, 5, 30):
        scaled = columns(x * 2.0**exponent)
        assert [scaled[name] for name in ("mxfp8", "nvfp4")] == [columns(x)[name] for name in ("mxfp8", "nvfp4")]


def test_what_is_not_finite_is_left_out_and_zeros_harm_nothing() -> None:
    x = torch.randn(2, 64)
    x[0, :3], x[1, 5] = torch.tensor([math.inf, -math.inf, math.nan]), 0.0
    for known in columns(x).values():
        assert (known["n"], known["read"], known["zero"]) == (125, 125, 1)
        assert known["flushed"] + known["clamped"] < 125
    for known in columns(torch.zeros(3, 40)).values():
        assert known == {"n": 120, "read": 120, "zero": 120, "flushed": 0, "smallest": 0, "subnormal": 0, "clamped": 0}
    nothing = columns(torch.full((2, 8), math.nan))
    assert all(not any(known.values()) for known in nothing.values())


def test_a_float64_that_float32_cannot_hold_is_beyond_every_range() -> None:
    found = columns(torch.tensor([1e300, -1e300, 1.0, math.inf], dtype=torch.float64))
    assert [found[known.name]["clamped"] for known in PLAIN] == [2.0] * 4
    assert found["fp16"]["n"] == 3


def test_float8_itself_can_be_counted() -> None:
    x = torch.tensor([[448.0, 2.0**-9, 0.0, 1.0]]).to(torch.float8_e4m3fn)
    assert columns(x)["fp8_e4m3"] == {"n": 4, "read": 4, "zero": 1, "flushed": 0, "smallest": 1, "subnormal": 1, "clamped": 0}


def shapes() -> Iterator[tuple[str, Tensor]]:
    torch.manual_seed(3)
    image = torch.randn(3, 4, 5, 70).to(memory_format=torch.channels_last)
    yield "transposed", torch.randn(70, 9).t()
    yield "channels last", image
    yield "cut out", torch.randn(9, 200)[:, 3:100:2]
    yield "expanded", torch.randn(1, 40).expand(7, 40)
    yield "short", torch.randn(5, 3, 7)
    yield "one axis", torch.randn(130)
    yield "no axis", torch.tensor(3.0)


@pytest.mark.parametrize(("name", "x"), [*shapes()], ids=lambda each: each if isinstance(each, str) else "")
def test_blocks_follow_the_last_axis_however_a_tensor_lies_in_memory(name: str, x: Tensor) -> None:
    x = x * torch.exp2(5 * torch.sin(torch.arange(float(x.numel()))).reshape(x.shape)) if name != "expanded" else x
    assert columns(x) == columns(x.clone(memory_format=torch.contiguous_format))
    assert columns(x)["nvfp4"]["n"] == x.numel()


def test_a_sample_has_no_bias_and_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(5)
    x = torch.randn(512, 512) * torch.exp2(6 * torch.randn(512, 512))
    state, whole = torch.get_rng_state(), columns(x)
    found = [columns(x, 65536, seed) for seed in range(16)]
    assert torch.equal(state, torch.get_rng_state())
    assert found[0] == columns(x, 65536, 0) != found[1]
    assert columns(x, 2**19)["bf16"] == {"n": 2**18, "read": 2**16, "zero": 0, "flushed": 0, "smallest": 0, "subnormal": 0, "clamped": 0}
    for name, expected in whole.items():
        assert found[0][name]["read"] == 65536 / 8
        assert found[0][name]["n"] == expected["n"] == x.numel()
        for kind in KINDS:
            share = sum(each[name][kind] for each in found) / 16 / x.numel()
            assert share == pytest.approx(expected[kind] / x.numel(), abs=0.01)


@pytest.mark.parametrize("size", [0.5, 1.0, 3.0])
def test_what_a_format_has_flushed_is_estimated_from_what_it_left(size: float) -> None:
    torch.manual_seed(2)
    x = torch.randn(256, 256) * size * BY_NAME["fp16"].smallest
    cast = x.half()
    found = columns(cast)["fp16"]
    shares = {kind: found[kind] / found["n"] for kind in ("zero", "subnormal", "smallest")}
    estimate = FormatUse("act", "grad_z", "fp16", True, x.numel(), flushed=None, clamped=None, **shares).lost
    assert estimate is not None
    truth = ((cast == 0) & (x != 0)).double().mean().item()
    # Never more than it is, and close where numbers are spread evenly about 0.
    assert truth / 3 < estimate < 1.02 * truth
    if size >= 1:
        assert estimate == pytest.approx(truth, rel=0.35)


def test_a_block_is_as_long_as_the_longest_of_a_format() -> None:
    assert max(known.block for known in FORMATS) == BLOCK
    assert all(BLOCK % known.block == 0 for known in FORMATS)
