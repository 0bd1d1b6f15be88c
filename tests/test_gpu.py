"""What only a CUDA device can show: no step waits for it, and its numbers are those of the CPU."""

import contextlib
import copy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import torchsat
from tests.models import Cnn, EverySite
from tests.test_activations import MODULES
from torchsat import Snapshot
from torchsat.trust import trust_kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Within it, an operation of torch that waits for the device raises."""
    with warnings.catch_warnings():
        # torch says that it does not detect every operation that waits.
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def one_step(model: nn.Module, x: Tensor, **options: object) -> torchsat.Snapshot:
    monitor = torchsat.watch(model, errors="raise", **options)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    monitor.close()
    assert monitor.latest is not None
    return monitor.latest


@pytest.mark.parametrize("module", [module for module in MODULES if not isinstance(module, nn.RReLU)], ids=repr)
def test_the_record_is_that_of_the_cpu(module: nn.Module) -> None:
    model, x = nn.Sequential(nn.Linear(16, 32), copy.deepcopy(module)).float(), torch.randn(64, 16)
    here, there = one_step(copy.deepcopy(model), x), one_step(copy.deepcopy(model).cuda(), x.cuda())
    moments = ("derivative", "derivative_rms", "peak", "z_mean", "z_std", "z_max", "a_std")
    for name in ("n", "low", "high", *moments, "attenuation", "grad_z_rms", "blocked", "trapped", "leaving"):
        expected = getattr(here["1"], name)
        assert getattr(there["1"], name) == (None if expected is None else pytest.approx(expected, rel=1e-4, abs=1e-6)), name
    assert there.weights[0].gain == pytest.approx(here.weights[0].gain, rel=1e-5)


@pytest.mark.parametrize("scaled", [False, True])
def test_no_step_waits_for_the_device(scaled: bool, tmp_path: Path) -> None:
    model = Cnn().cuda()
    x = torch.randn(16, 64, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    scaler = torch.amp.GradScaler("cuda", enabled=scaled)
    monitor = torchsat.watch(model, tmp_path, every=1, errors="raise")
    torch.cuda.synchronize()
    with waiting_is_an_error():
        for _ in range(20):
            with torch.autocast("cuda", torch.float16, enabled=scaled):
                loss = model(x).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    monitor.close()
    assert monitor.latest is not None
    assert monitor.latest.step >= 18
    assert len(torchsat.read(tmp_path)) >= 18


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_after_the_first_step_no_kind_of_site_waits_for_the_device(dtype: torch.dtype) -> None:
    model, x = EverySite().cuda(), torch.randn(8, 64, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = torchsat.watch(model, every=1, errors="raise")
    for step in range(6):
        # In the first step torchsat compares values to find out what modules of the user compute.
        with waiting_is_an_error() if step else contextlib.nullcontext():
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
    monitor.close()
    assert monitor.latest is not None
    assert monitor.latest.step == 5
    assert len(monitor.latest.records) == 20


@pytest.mark.parametrize("make", [Cnn, EverySite], ids=lambda make: make.__name__)
def test_training_is_bit_identical_on_the_device(make: type[nn.Module]) -> None:
    def run(watched: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = make().cuda()
        monitor = torchsat.watch(model, every=1, errors="raise") if watched else None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        generator = torch.Generator("cuda").manual_seed(1)
        for _ in range(6):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(torch.randn(16, 64, device="cuda", generator=generator)).square().mean()
            loss.backward()
            optimizer.step()
        if monitor is not None:
            monitor.close()
        return [parameter.detach() for parameter in model.parameters()]

    assert all(torch.equal(one, other) for one, other in zip(run(False), run(True), strict=True))


def test_a_model_may_move_to_the_device_after_watch() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.PReLU(8))
    monitor = torchsat.watch(model, every=1, errors="raise")
    for device in ("cpu", "cuda", "cpu"):
        model.to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            model(torch.randn(4, 8, device=device)).sum().backward()
            optimizer.step()
    monitor.close()
    assert monitor.latest is not None
    assert monitor.latest.step == 5


class Own(nn.Module):
    """Attention in three spellings, calls, a gate, and an activation of no row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), nn.Linear(16, 32)
        self.own = Wave()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        x = x + (x @ x.transpose(-1, -2)).softmax(-1) @ x
        return self.own(nn.functional.glu(self.second(torch.tanh(x))))  # type: ignore[no-any-return]


class Wave(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return torch.sin(3 * z)


def test_calls_and_attention_are_those_of_the_cpu() -> None:
    model, x = Own(), torch.randn(4, 6, 16)
    here, there = one_step(copy.deepcopy(model), x), one_step(copy.deepcopy(model).cuda(), x.cuda())
    assert [record.site for record in there.records] == [record.site for record in here.records]
    for expected in here.records:
        for name in ("n", "derivative", "z_std", "a_std", "attenuation", "entropy", "jacobian", "logit_std", "entropy_min", "blocked", "trapped"):
            value = getattr(expected, name)
            assert getattr(there[expected.site], name) == (None if value is None else pytest.approx(value, rel=1e-3, abs=1e-5)), (expected.site, name)


def test_the_kernels_are_right_here_and_read_everything() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    assert trust_kernels(torch.device("cuda", 0)) is None
    model, x = nn.Sequential(nn.Linear(64, 300), nn.GELU(), nn.Linear(300, 300), nn.Tanh()), torch.randn(3000, 64)
    here, there = one_step(copy.deepcopy(model), x, sample=None), one_step(copy.deepcopy(model).cuda(), x.cuda())
    for site in ("1", "3"):
        assert there[site].n == here[site].n == 900_000
        for name in ("saturated", "derivative", "derivative_rms", "z_std", "a_std", "attenuation", "grad_z_rms"):
            assert getattr(there[site], name) == pytest.approx(getattr(here[site], name), rel=1e-4, abs=1e-6), (site, name)
        # The demand is that of 65536 of the elements.
        assert [there[site].blocked, there[site].trapped] == pytest.approx([here[site].blocked, here[site].trapped], abs=5e-4)


# torch advises TensorFloat32, whose roundings would differ between the two runs.
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
# torch captures an empty graph of its own to begin with.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_in_the_graph_every_step_is_measured_as_in_eager(mode: str) -> None:
    def run(compiled: str) -> list[torchsat.Snapshot]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, found = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)).cuda(), list[Snapshot]()
        monitor = torchsat.watch(model, every=1, budget=None, compiled=compiled, sinks=[found.append], errors="raise")  # type: ignore[arg-type]
        step = torch.compile(model, mode=mode, fullgraph=True) if compiled == "in_graph" else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        generator = torch.Generator("cuda").manual_seed(1)
        for _ in range(8):
            optimizer.zero_grad()
            step(torch.randn(128, 32, device="cuda", generator=generator)).square().mean().backward()
            optimizer.step()
        monitor.close()
        return found

    inside, outside = run("in_graph"), run("eager")
    assert [snapshot.step for snapshot in inside] == [snapshot.step for snapshot in outside] == list(range(8))
    for one, other in zip(inside, outside, strict=True):
        for record, expected in zip(one.records, other.records, strict=True):
            for name in ("n", "derivative", "z_std", "a_std", "grad_a_rms", "grad_z_rms"):
                assert getattr(record, name) == pytest.approx(getattr(expected, name), rel=1e-3, abs=1e-6), (one.step, record.site, name)


@pytest.mark.parametrize("outside", [False, True], ids=["whole step", "without the optimizer"])
def test_a_step_that_is_captured_by_hand_trains_the_same_and_is_left_alone(outside: bool) -> None:
    def run(watched: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model, found = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 1)).cuda(), list[Snapshot]()
        monitor = torchsat.watch(model, every=1, budget=None, sinks=[found.append], errors="raise") if watched else None
        optimizer, x = torch.optim.SGD(model.parameters(), lr=0.01), torch.randn(128, 32, device="cuda")

        def step() -> None:
            optimizer.zero_grad(set_to_none=False)
            model(x).square().mean().backward()
            if not outside:
                optimizer.step()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
                if outside:
                    optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for _ in range(5):
            graph.replay()
            if outside:
                optimizer.step()
        step()
        optimizer.step()
        if monitor is not None:
            monitor.close()
            assert [snapshot.step for snapshot in found][:3] == [0, 1, 2]
            assert len(found) >= 3 + (not outside)
        return [parameter.detach() for parameter in model.parameters()]

    assert all(torch.equal(one, other) for one, other in zip(run(False), run(True), strict=True))


def test_a_group_on_the_device_records_the_same_and_waits_for_nothing() -> None:
    """One rank, whose collectives go through NCCL all the same."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:

        def run(group: dist.ProcessGroup | None) -> list[torchsat.Snapshot]:
            torch.manual_seed(0)
            model, found = (
                nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)).cuda(),
                list[Snapshot](),
            )
            monitor = torchsat.watch(model, every=1, budget=None, group=group, sinks=[found.append], errors="raise")
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            generator = torch.Generator("cuda").manual_seed(1)
            for step in range(12):
                # Who takes part is found out at the end of the first step, and agreed upon once.
                with waiting_is_an_error() if step else contextlib.nullcontext():
                    optimizer.zero_grad()
                    model(torch.randn(128, 32, device="cuda", generator=generator)).square().mean().backward()
                    optimizer.step()
            monitor.close()
            return found

        merged, alone = run(dist.group.WORLD), run(None)
    finally:
        dist.destroy_process_group()
    assert [snapshot.step for snapshot in merged] == list(range(12))
    for one, other in zip(merged, alone, strict=True):
        for record, expected in zip(one.records, other.records, strict=True):
            assert record.worst_rank == 0
            for name in ("n", "saturated", "derivative", "z_std", "grad_z_rms", "stuck"):
                assert getattr(record, name) == pytest.approx(getattr(expected, name), rel=1e-9), (one.step, record.site, name)
        for weight, expected_weight in zip(one.weights, other.weights, strict=True):
            for name in ("n", "norm", "grad_norm", "update_ratio", "input_rms"):
                assert getattr(weight, name) == pytest.approx(getattr(expected_weight, name), rel=1e-9), (one.step, weight.name, name)


@pytest.mark.parametrize("kind", ["ddp", "fully_shard", "pipeline"])
def test_several_devices_record_what_one_does(kind: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("fewer than two CUDA devices")
    example = str(Path(__file__).parent.parent / "examples" / "ddp.py")
    given = [] if kind == "ddp" else [f"--{kind.replace('_', '-')}"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", example, "--device", "cuda", *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "counts that differ: 0; " in done.stdout
    assert float(done.stdout.split()[-1]) < 1e-9
