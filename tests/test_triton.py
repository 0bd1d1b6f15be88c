"""The kernels for NVIDIA GPUs give the same rows as the plain implementation, and compile for GPUs.

On a machine with a GPU they run there, elsewhere in Triton's interpreter on the CPU. What they cost is measured by benchmarks/bandwidth.py.
"""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchsat
from tests.test_activations import row as row_of
from tests.test_kernels import COLUMNS, hostile
from tests.truth import known
from torchsat import attention, statistics
from torchsat import kernels as package
from torchsat.activations import bind
from torchsat.columns import HEADS
from torchsat.kernels.formulas import formula
from torchsat.observe import meter
from torchsat.sampling import Sample, Units
from torchsat.softmax import scan_softmax
from torchsat.statistics import extremes, observe, observe_gradient
from torchsat.trust import disagreement

pytest.importorskip("triton", reason="Triton is not installed")
# The interpreter computes with NumPy, which warns of overflows; a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
"""Where the kernels run. The plain implementation always runs on the CPU."""


@pytest.fixture
def kernels() -> ModuleType:
    from torchsat.kernels import cuda

    return cuda


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "engine", lambda *tensors: None)


def close(found: Tensor, expected: Tensor) -> None:
    """Compare two rows up to the rounding of float32. Near the edge of a bin, one element, of a weight below 4, may be counted in the next bin."""
    for name, one, other in zip(COLUMNS, found.tolist(), expected.tolist(), strict=True):
        assert one == pytest.approx(other, rel=2e-6, abs=4 if name.startswith("bin") else 1e-30), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "axis", "limit", "edges", "peak"),
    [
        ((37, 41), 1, None, (-2.0, 2.0), 1.0),
        ((5, 7, 9, 11), 1, 1000, (0.0, None), 1.0),
        ((130, 97), 1, None, (None, 3.0), 0.25),
        ((3, 700), 0, None, (None, None), None),
        ((1,), 0, None, (0.0, 1.0), 1.0),
    ],
)
@pytest.mark.usefixtures("plain")
def test_forward_rows_and_units(
    kernels: ModuleType,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    axis: int,
    limit: int | None,
    edges: tuple[float | None, float | None],
    peak: float | None,
) -> None:
    whole = hostile(shape, dtype)
    sample = Sample.of(whole, limit, 3)
    units = Units(sample, axis)
    z, a = sample.take(whole), sample.take(torch.tanh(whole.float()).to(dtype))
    slope = 1 / (1 + z.float().abs())
    there = [sample.take(each.to(DEVICE)) for each in (whole, torch.tanh(whole.float()).to(dtype))]
    for sigmoid in (True, False):
        row, block = observe(z, a, slope, peak, edges, whole.numel(), sigmoid, units)
        found, counts = statistics.empty_row(DEVICE), torch.zeros(4, units.size, dtype=torch.float64, device=DEVICE)
        for _ in range(2):
            kernels.observe(*there, slope.to(DEVICE), peak, edges, whole.numel(), sigmoid, None, found, units.place, counts)
        close(found, statistics.merge_(row, row.clone()))
        assert block is not None
        assert torch.allclose(counts.cpu(), 2 * block, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("plain")
def test_extremes(kernels: ModuleType, dtype: torch.dtype) -> None:
    z, a = hostile((130, 97), dtype), hostile((130, 97), dtype).flip(0)
    found = kernels.extremes(z.flatten().to(DEVICE), a.flatten().to(DEVICE))
    assert found.tolist() == extremes(z, a).tolist()
    # They replace what was found in a sample.
    row = statistics.empty_row(DEVICE)
    some = torch.tensor([1.0, math.nan], device=DEVICE)
    kernels.observe(some, some, some, 1.0, (None, None), z.numel(), False, found, row)
    assert row[[COLUMNS.index(name) for name in statistics.EXACT]].tolist() == found.tolist()


def test_of_many_elements_the_units_are_counted_on_an_even_sample(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_UNIT_SAMPLES", 3000)
    z = torch.arange(7.0, device=DEVICE).sub(3).repeat(4000, 1)
    units, counts = Units(Sample.of(z, None, 0), 1), torch.zeros(4, 7, dtype=torch.float64, device=DEVICE)
    row = statistics.empty_row(DEVICE)
    kernels.observe(z.flatten(), z.flatten(), torch.ones_like(z).flatten(), 1.0, (-2.5, 1.5), z.numel(), False, None, row, units.place, counts)
    counts = counts.cpu()
    assert row[0] == 28000
    assert counts[2].sum() == 3000
    # The places are drawn: the standard deviation of each count is 20 at most.
    assert (counts[2] - 3000 / 7).abs().max() < 80
    # What was counted stands for all elements.
    assert torch.allclose(counts[0], counts[2] * 28000 / counts[2].sum(), rtol=1e-12, atol=0)
    assert torch.equal(counts[1], counts[0] * torch.tensor([1.0, 0, 0, 0, 0, 1, 1]))


@pytest.mark.parametrize(
    "module",
    [
        *(nn.Sigmoid(), nn.Tanh(), nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.5, 2.0), nn.Hardsigmoid(), nn.Threshold(0.3, 1.0), nn.SiLU()),
        *(nn.GELU("tanh"), nn.GELU()),
    ],
    ids=repr,
)
def test_the_formulas_are_the_derivatives_of_the_table(kernels: ModuleType, module: nn.Module) -> None:
    bound = bind(row_of(module), module, 0.05)
    of = formula(bound)
    assert of is not None
    assert of.kind in kernels.KINDS
    z = torch.cat([torch.linspace(-20, 20, 21), torch.tensor([0.0, -0.0, 3.0, 6.0, -0.5, 2.0, 1e4, -1e4, 700, -700, 1e-30])])
    for each in z:
        row, there = statistics.empty_row(DEVICE), each.reshape(1).to(DEVICE)
        kernels.observe(there, there, of, 1.0, (None, None), 1, False, None, row)
        expected = bound.evaluate(each.double(), each.double(), {})[0].item()
        assert row[COLUMNS.index("derivative")].item() == pytest.approx(expected, rel=1e-5, abs=3e-8), each


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("plain")
def test_gradients(kernels: ModuleType, dtype: torch.dtype) -> None:
    here = hostile((130, 97), dtype).flatten(), hostile((130, 97), dtype).flatten().flip(0)
    there = [each.to(DEVICE) for each in here]
    for has_a, has_z, apart in ((True, True, 1), (True, False, 1), (False, True, 1), (True, True, 7)):
        first, second = ([each[::apart] if has else None for has, each in zip((has_a, has_z), both, strict=True)] for both in (here, there))
        row = statistics.empty_row(DEVICE)
        kernels.observe_gradient(*second, len(here[0][::apart]), 3 * len(here[0][::apart]), row)
        close(row, observe_gradient(first[0], first[1], 3 * len(here[0][::apart])))


# The interpreter of Triton multiplies the bits of bfloat16.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])], ids=str)
@pytest.mark.parametrize(
    ("heads", "groups", "queries", "keys", "features", "is_causal"),
    [(2, 2, 70, 70, 24, True), (4, 2, 5, 130, 16, False), (3, 1, 130, 40, 8, True), (1, 1, 1, 1, 1, False), (2, 2, 3, 3, 4, True)],
)
def test_all_logits_of_an_attention(
    kernels: ModuleType, dtype: torch.dtype, heads: int, groups: int, queries: int, keys: int, features: int, is_causal: bool
) -> None:
    torch.manual_seed(0)
    # The layout of a model: the axis of the heads lies behind that of the positions.
    q = torch.randn(2, queries, heads, features).mul(3).to(dtype).transpose(1, 2)
    k = torch.randn(2, keys, groups, features).mul(3).to(dtype).transpose(1, 2)
    if queries > 60:
        q[1, 0, 60, 0], k[0, -1, 35, 1] = math.nan, math.inf
    z = 0.25 * (q.double() @ k.double().repeat_interleave(heads // groups, 1).transpose(-1, -2))
    seen = torch.ones(queries, keys, dtype=torch.bool).tril() if is_causal else torch.ones(queries, keys, dtype=torch.bool)
    expected, expected_heads = scan_softmax(z, seen[None, None], None)
    found, block = kernels.scan_logits(q.to(DEVICE), k.to(DEVICE), 0.25, is_causal)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-6, abs=1e-6)
    for name, one, other in zip(HEADS, block.tolist(), expected_heads.tolist(), strict=True):
        assert one == pytest.approx(other, rel=2e-6, abs=2e-6), name


@pytest.mark.parametrize(("batched", "is_causal"), [(True, True), (True, False), (False, True)])
def test_an_attention_is_multiplied_by_the_kernel(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, batched: bool, is_causal: bool) -> None:
    """The calls of torch that have no mask: those of 3 axes, of grouped heads, and of F.multi_head_attention_forward."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(32, 4, batch_first=True).to(DEVICE)
    q, k = torch.randn(2, 4, 9, 16).to(DEVICE), torch.randn(2, 2, 9, 16).to(DEVICE)
    parts = [attention.Attention.of(F.scaled_dot_product_attention, (q, k, k), {"is_causal": is_causal, "enable_gqa": True})]
    if not batched:
        parts = [attention.Attention.of(F.scaled_dot_product_attention, (q[0], q[1], q[1]), {"is_causal": is_causal, "scale": 2.0})]
    x = torch.randn(3, 9, 32).to(DEVICE)
    given: dict[str, object] = dict(
        zip(
            ("embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v", "add_zero_attn", "dropout_p"),
            (32, 4, layer.in_proj_weight, layer.in_proj_bias, None, None, False, 0.0),
            strict=True,
        )
    )
    given |= {"out_proj_weight": layer.out_proj.weight, "out_proj_bias": layer.out_proj.bias, "need_weights": False}
    if is_causal:
        given |= {"attn_mask": torch.ones(9, 9, device=DEVICE).tril().log(), "is_causal": True}
    parts.append(attention.Attention.of(F.multi_head_attention_forward, (x, x, x), given))
    # What has to be projected is done for one sample at a time.
    monkeypatch.setattr(attention, "_PROJECTED", 600)
    for part in parts:
        expected, heads = part.scan(None)
        monkeypatch.setattr(attention, "on_gpu", lambda *tensors: kernels)
        monkeypatch.setattr(kernels, "reads", lambda *tensors: True)
        found = dataclasses.replace(part, device=torch.device("meta")).scan(None)
        assert found[0].tolist() == pytest.approx(expected.tolist(), rel=1e-5)
        assert torch.allclose(found[1].cpu(), heads.cpu(), rtol=1e-5, atol=1e-6)


def sum_of(values: Tensor) -> float:
    """The sum of squares."""
    return values.square().sum().item()


@pytest.mark.parametrize("size", [0, 1, 1000, 200_001])
def test_sums_of_squares(kernels: ModuleType, size: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, y = (torch.randn(size).mul(1e-3).to(dtype) for _ in range(2))
        out = torch.full((4,), 7.0, dtype=torch.float64, device=DEVICE)
        kernels.squares(x.to(DEVICE), y.to(DEVICE), out, 1)
        wide = x.double(), y.double()
        assert out.tolist() == pytest.approx([7.0, sum_of(wide[0]), sum_of(wide[1] - wide[0]), 7.0], rel=1e-12)
        kernels.squares(y.to(DEVICE), None, out, 3)
        assert out[2:].tolist() == pytest.approx([sum_of(wide[1] - wide[0]), sum_of(wide[1])], rel=1e-12)


@pytest.mark.parametrize(("shape", "axis", "limit"), [((50, 7), 1, None), ((6, 5, 40), 1, None), ((300, 20), 1, 1000)])
@pytest.mark.usefixtures("plain")
def test_the_features_of_an_input(kernels: ModuleType, shape: tuple[int, ...], axis: int, limit: int | None) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = hostile(shape, dtype)
        sample = Sample.of(x, limit, 5)
        units = sample.units(axis)
        expected = statistics.observe_features(sample.take(x), units)
        sums = torch.zeros_like(expected, device=DEVICE)
        for _ in range(2):
            kernels.add_features(sample.take(x.to(DEVICE)), units.place, sums)
        assert torch.allclose(sums.cpu(), 2 * expected, rtol=1e-12, atol=0)


def test_the_check_before_training_passes_right_kernels_and_no_others(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert disagreement(kernels, DEVICE) is None
    right = kernels.observe_gradient

    def wrong(grad_a: Tensor, grad_z: Tensor, count: int, elements: int, row: Tensor, *sides: Tensor | int) -> None:
        right(grad_a, grad_z, count - 1000, elements, row, *sides)

    monkeypatch.setattr(kernels, "observe_gradient", wrong)
    assert str(disagreement(kernels, DEVICE)).startswith("grad_a_read is 18998")
    assert not kernels.reads(torch.zeros(1))


@pytest.mark.slow
def test_a_monitor_reads_all_of_a_call_where_kernels_do(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hooks of a model to its records, as on a GPU, with the kernels for GPUs."""
    monkeypatch.setattr(statistics, "engine", lambda *tensors: kernels)
    monkeypatch.setattr(meter, "reads_whole", lambda tensor: True)
    torch.manual_seed(0)
    modules = (nn.Tanh(), nn.GELU(), nn.ELU(), nn.ReLU(inplace=True))
    model = nn.Sequential(*(each for act in modules for each in (nn.Linear(300, 300), act))).to(DEVICE)
    x, found = torch.randn(300, 300).to(DEVICE), list[torchsat.Snapshot]()
    for sample in ("auto", 65536, None):
        monitor = torchsat.watch(model, sample=sample, sinks=[found.append], errors="raise")
        model(x).square().mean().backward()
        torch.optim.SGD(model.parameters(), lr=0.0).step()
        monitor.close()
    auto, some, everything = found
    assert [record.n for record in everything.records] == [90000] * 4
    assert [record.n for record in some.records] == [65536] * 4
    # Of two sites only a sample is read: ELU is evaluated by torch, and z of an in-place activation has to be copied.
    assert [record.n == 90000 for record in auto.records] == [True, True, False, False]
    for record in auto.records:
        whole = everything[record.site]
        for name in ("derivative", "z_std", "a_std", "grad_a_rms", "grad_z_rms", "saturated"):
            rel = 1e-5 if record.n == 90000 else 0.05
            assert getattr(record, name) == pytest.approx(getattr(whole, name), rel=rel, abs=1e-9), name
    assert math.isfinite(known(auto.records[0].derivative))


def test_told_so_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "_gpu", None)
    monkeypatch.setenv("TORCHSAT_KERNELS", "0")
    assert package.gpu() is None


COMPILE = """
import json
from triton.backends import compiler as backend
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from torchsat.kernels import cuda, cuda_gradients, cuda_logits, cuda_rows, cuda_sums

def compiled(kernel, pointers, floats, **constants):
    names = kernel.arg_names
    kinds = {**dict.fromkeys(names, "i32"), **dict.fromkeys(floats, "fp32"), **pointers, **dict.fromkeys(constants, "constexpr")}
    if hasattr(backend, "AttrsDescriptor"):  # Triton 3.2
        kinds = {name: kind for name, kind in kinds.items() if kind != "constexpr"}
        source = ASTSource(kernel, kinds, constants, backend.AttrsDescriptor.from_hints({names.index(name): 16 for name in pointers}))
    else:
        aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
        source = ASTSource(kernel, kinds, {(names.index(name),): value for name, value in constants.items()}, aligned)
    for architecture in (80, 90)[:: 1 if kernel is cuda_logits.scan_logits else 2]:
        found = compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": cuda.WARPS, "enable_fp_fusion": True})
        # Spilled registers would be memory of each thread, which the assembler names a local depot.
        assert "__local_depot" not in found.asm["ptx"], kernel
        # All GPUs from 8.0 on have so much memory for a program.
        assert found.metadata.shared <= 101376, (kernel, found.metadata.shared)
    return found.asm["ptx"]

floats = ("low", "high", "peak", "b", "c", "d")
rest = dict(row_ptr="*fp64", block_ptr="*fp64", exact_ptr="*fp64", slope_ptr="*fp32")
wide, narrow = (dict(threads=cuda.THREADS, neighbours=size) for size in (4, 8))
for kind in sorted(cuda.KINDS):
    dtype, tile = ("*bf16", narrow) if kind % 2 else ("*fp32", wide)
    for flag in (True, False) if kind == 1 else (True,):
        flags = dict(has_peak=flag, has_units=flag, has_exact=flag, sigmoid=flag)
        ptx = compiled(cuda_rows.observe, dict(z_ptr=dtype, a_ptr=dtype, **rest), floats, kind=kind, **flags, **tile)
        assert "ld.global.v4" in ptx
compiled(cuda_rows.extremes, dict(z_ptr="*fp16", a_ptr="*fp16", out_ptr="*fp64"), (), **narrow)
given = dict(z_ptr="*fp16", row_ptr="*fp64")
flags = dict(has_z=True, a_step=1, **narrow)
compiled(cuda_gradients.gradient, dict(a_ptr="*fp16", side_ptr="*i8", **given), (), has_a=True, has_sides=True, z_step=1, **flags)
compiled(cuda_gradients.gradient, dict(a_ptr="*fp64", side_ptr="*fp64", **given), (), has_a=False, has_sides=False, **flags)
compiled(cuda_gradients.sides, dict(z_ptr="*bf16", out_ptr="*i8"), ("low", "high"), block=4 * cuda.THREADS, z_step=1)
pointers = dict(q_ptr="*bf16", k_ptr="*bf16", exact_ptr="*fp64", heads_ptr="*fp64")
blocks = dict(block_queries=cuda.BLOCK_QUERIES, block_keys=cuda.BLOCK_KEYS)
for dtype, features in (("*bf16", 64), ("*fp32", 32), ("*fp16", 256)):
    pointers |= dict(q_ptr=dtype, k_ptr=dtype)
    compiled(cuda_logits.scan_logits, pointers, ("factor",), is_causal=features < 256, block_features=features, q_feature=1, k_feature=1, **blocks)
compiled(cuda_sums.squares, dict(x_ptr="*fp32", y_ptr="*fp32", out_ptr="*fp64"), (), has_y=True, **wide)
compiled(cuda_sums.features, dict(x_ptr="*bf16", sums_ptr="*fp64"), (), width=4 * cuda.THREADS)
"""


@pytest.mark.slow
def test_they_compile_for_a_gpu_and_load_four_elements_at_once(tmp_path: Path) -> None:
    script = tmp_path / "compile_them.py"
    script.write_text(COMPILE)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, str(script)], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
