"""The kernels in cpu.c, samples.c and softmax.c: compiled if there is a C compiler, kept in the user's cache, and called through ctypes.

They are plain C and not torch.compile, because C compiles in one second and not in ten, needs no headers of torch, and leaves the state of torch's
compiler in the user's process alone (recompile limits, stance, caches of Dynamo). The library is compiled for the processor it runs on. The name of
its file is a hash over the source, the command and what that processor can do, so that machines which share a home folder do not load each other's
library.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from torchsat.columns import BINS, BLOCK, COLUMN, HEADS, SUMS, UNWEIGHED
from torchsat.kernels.formulas import BETWEEN, FIRST_BIN, GELU, GIVEN, LOGISTIC, SILU, Formula

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("cpu.c", "samples.c", "softmax.c"))
_HEADER = Path(__file__).with_name("vectors.h")
_KINDS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""The number of each type in vectors.h."""
_NAMES = {"COLUMNS": COLUMN, "HEAD_COLUMNS": HEADS, "UNIT_COLUMNS": BLOCK, "UNWEIGHED": UNWEIGHED}
_MACROS = {"SUMS": len(SUMS), "BINS": len(BINS), "FIRST": FIRST_BIN, **{macro: ",".join(names).upper() for macro, names in _NAMES.items()}}
_FLAGS = ("-std=c11", "-O3", "-fno-trapping-math", "-fno-math-errno", "-fno-strict-aliasing", "-fPIC")
_BASE = [*_FLAGS, *(f"-D{macro}={value}" for macro, value in _MACROS.items())]
_ATTEMPTS: tuple[list[str], ...] = (["-march=native", "-fopenmp"], ["-march=native", "-fopenmp-simd"], [])
"""Flags to try, the best first. OpenMP is compiled in but not linked: its functions are found in the library that torch has loaded, with torch's
threads."""
KINDS = frozenset((GIVEN, LOGISTIC, BETWEEN, SILU, GELU))
"""The kinds of derivatives that cpu.c computes from z."""
_SECONDS = 60
"""Seconds after which a compiler is given up."""
_PART = 16384
"""With fewer elements than this, a thread costs more than it saves."""


class _Vector(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("kind", ctypes.c_int64), ("stride", ctypes.c_int64))


class _Four(ctypes.Structure):
    _fields_ = (("data", _Vector), ("strides", ctypes.c_int64 * 4))


class _Axis(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_int64) for name in ("elements", "read", "seed", "inner", "size")), ("table", ctypes.c_void_p))


class _Choice(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_int64) for name in ("count", "columns", "row", "read")), ("places", ctypes.c_void_p))


class _Derivative(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int64), ("b", ctypes.c_double), ("c", ctypes.c_double), ("d", ctypes.c_double), ("given", _Vector))


Place = tuple[int, int, int, int, int]
"""sampling.Units.place."""
_NOTHING = _Vector(None, 0, 0)


def reads(*tensors: Tensor | None) -> bool:
    """Whether the kernels are compiled and can read these vectors."""
    for each in tensors:
        if each is not None and (not each.is_cpu or each.dtype not in _KINDS):
            return False
    return _library() is not None


def observe(
    z: Tensor,
    a: Tensor,
    slope: Tensor | Formula,
    peak: float | None,
    edges: tuple[float | None, float | None],
    elements: int,
    sigmoid: bool,
    exact: Tensor | None,
    row: Tensor,
    place: Place | None = None,
    block: Tensor | None = None,
    table: Tensor | None = None,
) -> None:
    """Merge a forward call into a row, and add the samples of each unit to a unit block, if there is one.

    The arguments are those of statistics.observe; `place` and `table` are those of the units.
    """
    low, high = (float("nan") if edge is None else edge for edge in edges)
    if isinstance(slope, Formula):
        derivative = _Derivative(slope.kind, slope.b, slope.c, slope.d, _NOTHING)
    else:
        derivative = _Derivative(GIVEN, 0.0, 0.0, 0.0, _Vector(slope.data_ptr(), _KINDS[slope.dtype], slope.stride(0)))
    _loaded().torchsat_observe(
        _vector(z),
        _vector(a),
        ctypes.byref(derivative),
        z.shape[0],
        elements,
        low,
        high,
        float("nan") if peak is None else peak,
        sigmoid,
        _threads(z.shape[0]),
        None if exact is None else exact.data_ptr(),
        row.data_ptr(),
        None if place is None else ctypes.byref(_axis(place, table)),
        None if block is None else block.data_ptr(),
    )


def extremes(z: Tensor, a: Tensor | None) -> Tensor:
    """statistics.EXACT of z and a, which are both [rows, columns], or both vectors. Without a, its columns are not defined."""
    found, count, other = torch.empty(5, dtype=torch.float64), z.numel(), z if a is None else a
    columns, z_row, a_row = (_PART, _PART * z.stride(0), _PART * other.stride(0)) if z.ndim == 1 else (z.shape[1], z.stride(0), other.stride(0))
    _loaded().torchsat_extremes(
        ctypes.byref(_Vector(z.data_ptr(), _KINDS[z.dtype], z.stride(-1))),
        ctypes.byref(_NOTHING if a is None else _Vector(a.data_ptr(), _KINDS[a.dtype], a.stride(-1))),
        *(count, columns, z_row, a_row, _threads(count), found.data_ptr()),
    )
    return found


def take(whole: Tensor, chosen: Tensor) -> Tensor:
    """The elements at these places (int32, see sampling.py) of a vector of neighbours, or of [rows, columns] whose columns are neighbours."""
    taken = torch.empty(chosen.shape[0], dtype=whole.dtype)
    _take(whole, chosen, False, taken, None, _threads(chosen.shape[0]))
    return taken


def take_and_scan(whole: Tensor, chosen: Tensor, is_z: bool) -> tuple[Tensor, Tensor]:
    """The elements at these places of a vector of neighbours, and statistics.EXACT of all elements, as those of z or of a."""
    taken, found = torch.empty(chosen.shape[0], dtype=whole.dtype), torch.empty(5, dtype=torch.float64)
    _take(whole, chosen, is_z, taken, found.data_ptr(), _threads(whole.shape[0]))
    return taken, found


def _take(whole: Tensor, chosen: Tensor, is_z: bool, taken: Tensor, found: int | None, threads: int) -> None:
    size = whole.numel()
    columns, row = (size, size) if whole.ndim == 1 else (whole.shape[1], whole.stride(0))
    of = _Choice(size, columns, row, chosen.shape[0], chosen.data_ptr())
    vector = _Vector(whole.data_ptr(), _KINDS[whole.dtype], 1)
    _loaded().torchsat_take(ctypes.byref(vector), ctypes.byref(of), is_z, threads, taken.data_ptr(), found)


def _threads(count: int) -> int:
    """How many threads read so many elements."""
    return max(1, min(torch.get_num_threads(), count // _PART))


def places(size: int, count: int, seed: int, rows: int, out: Tensor) -> None:
    """Write sampling.places to `out`, which is int32 or int64."""
    _loaded().torchsat_places(size, count, seed, rows, out.dtype == torch.int64, out.data_ptr())


def observe_softmax(logits: Tensor, visible: Tensor, elements: int, row: Tensor) -> None:
    """Write a softmax into an empty row. `visible` has the shape of the logits."""
    four = ctypes.c_int64 * 4
    _loaded().torchsat_softmax(
        ctypes.byref(_Vector(logits.data_ptr(), _KINDS[logits.dtype], 1)),
        visible.data_ptr(),
        four(*logits.shape),
        four(*logits.stride()),
        four(*visible.stride()),
        elements,
        row.data_ptr(),
    )


def scan_softmax(z: Tensor, visible: Tensor | None, a: Tensor | None, broken: Tensor | None) -> tuple[Tensor, Tensor]:
    """softmax.scan_softmax of [batch, heads, queries, keys]. All have this shape, but `broken` has one key; visible None: all keys are."""
    found, block = torch.empty(5, dtype=torch.float64), torch.zeros(len(HEADS), z.shape[1], dtype=torch.float64)
    block[-1] = -math.inf
    strides = ctypes.c_int64 * 4
    of_z, of_a = (_Four(_NOTHING if each is None else _Vector(each.data_ptr(), _KINDS[each.dtype], 0), strides(*_strides(each))) for each in (z, a))
    bytes_of = [part for each in (visible, broken) for part in (None if each is None else each.data_ptr(), strides(*_strides(each)))]
    _loaded().torchsat_scan_softmax(
        ctypes.byref(of_z), ctypes.byref(of_a), strides(*z.shape), *bytes_of, _threads(z.numel()), found.data_ptr(), block.data_ptr()
    )
    return found, block


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if tensor is None else tensor.stride()


def sides(z: Tensor, edges: tuple[float | None, float | None], count: int, seed: int) -> Tensor:
    """statistics.Sides.values of a vector. On the CPU every element has its side: `count` is the length, and nothing is drawn."""
    assert count == z.shape[0]
    out = torch.empty(z.shape[0], dtype=torch.int8)
    low, high = (float("nan") if edge is None else edge for edge in edges)
    _loaded().torchsat_sides(_vector(z), z.shape[0], low, high, out.data_ptr())
    return out


def observe_gradient(
    grad_a: Tensor | None, grad_z: Tensor | None, count: int, elements: int, row: Tensor, sides: Tensor | None = None, seed: int = 0
) -> None:
    """Merge a backward call of so many elements into a row. `count` is the length of the gradients, of which one may be missing, and of the sides.
    The seed is not needed: every element has its side."""
    given = None if sides is None or grad_a is None else sides.data_ptr()
    _loaded().torchsat_gradient(_vector(grad_a), _vector(grad_z), count, elements, given, row.data_ptr())


def add_features(x: Tensor, place: Place, table: Tensor | None, sums: Tensor) -> None:
    """Add the samples, the sum of x and the sum of x^2 of each unit to [3, size], unweighed. `place` and `table` are those of the units."""
    _loaded().torchsat_features(_vector(x), x.shape[0], ctypes.byref(_axis(place, table)), sums.data_ptr())


def unit_table(place: Place) -> Tensor:
    """The unit of each element that is read, as int32; `place` is that of the units."""
    table = torch.empty(place[1], dtype=torch.int32)
    _loaded().torchsat_units(ctypes.byref(_axis(place, None)), table.data_ptr())
    return table


def _axis(place: Place, table: Tensor | None) -> _Axis:
    return _Axis(*place, None if table is None else table.data_ptr())


def squares(x: Tensor, other: Tensor | None, out: Tensor, at: int) -> None:
    """Write the sum of squares of a vector to out[at] and, if there is another one, the sum of squares of their difference to out[at + 1]."""
    _loaded().torchsat_squares(_vector(x), _vector(other), x.shape[0], out.data_ptr() + 8 * at)


def _vector(tensor: Tensor | None) -> object:
    if tensor is None:
        return ctypes.byref(_NOTHING)
    return ctypes.byref(_Vector(tensor.data_ptr(), _KINDS[tensor.dtype], tensor.stride(0)))


def _loaded() -> ctypes.CDLL:
    library = _library()
    assert library is not None
    return library


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels; None where there is no compiler, none of the commands works, or the user does not want them."""
    compiler = os.environ.get("CC") or next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if os.environ.get("TORCHSAT_KERNELS") == "0" or compiler is None or os.name != "posix":
        return None
    for flags in _ATTEMPTS:
        try:
            return _load(_built([*shlex.split(compiler), *_BASE, *flags]))
        except (OSError, subprocess.SubprocessError):
            continue
    return None


def _built(command: list[str]) -> Path:
    """The library that this command compiles, from the cache if it is there."""
    read = [each.read_bytes() for each in (_HEADER, *_SOURCES)]
    name = hashlib.sha256(b"\0".join([*read, *(part.encode() for part in command), _processor()])).hexdigest()[:32] + ".so"
    for folder in (Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchsat", _private()):
        try:
            kept = folder / name
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.stat().st_uid != os.getuid():
                continue
            if not kept.exists():
                with tempfile.TemporaryDirectory(dir=folder) as work:
                    parts, whole = [str(Path(work, source.name).with_suffix(".o")) for source in _SOURCES], Path(work) / name
                    for source, part in zip(_SOURCES, parts, strict=True):
                        _run([*command, "-c", str(source), "-o", part])
                    _run([command[0], "-shared", *parts, "-o", str(whole), "-lm"])
                    # A rename, which is atomic, so that another process never loads half a library.
                    whole.replace(kept)
        except (PermissionError, FileNotFoundError, NotADirectoryError):
            continue
        return kept
    raise OSError("no folder to build in")


def _private() -> Path:
    """The folder to build in where the user's cache cannot be written."""
    return Path(tempfile.gettempdir()) / f"torchsat-{os.getuid()}"


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS)


def _processor() -> bytes:
    """The model and the features of this processor, as the system describes them."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return b"".join(next((line for line in lines if line.startswith(key)), b"") for key in (b"model name", b"flags", b"Features"))


def _load(path: Path) -> ctypes.CDLL:
    """Load the kernels.

    Raises:
        OSError: the file is no library, a function is missing in it, or the sum of squares of 3 and 4 is not 25.
    """
    library = ctypes.CDLL(str(path))
    pointer, number, integer = ctypes.c_void_p, ctypes.c_double, ctypes.c_int64
    signatures = {
        "torchsat_observe": [*[pointer] * 3, integer, *[number] * 4, integer, integer, *[pointer] * 4],
        "torchsat_extremes": [pointer, pointer, *[integer] * 5, pointer],
        "torchsat_take": [pointer, pointer, integer, integer, pointer, pointer],
        "torchsat_units": [pointer, pointer],
        "torchsat_scan_softmax": [*[pointer] * 7, integer, pointer, pointer],
        "torchsat_places": [*[integer] * 5, pointer],
        "torchsat_softmax": [*[pointer] * 5, number, pointer],
        "torchsat_sides": [pointer, integer, number, number, pointer],
        "torchsat_gradient": [pointer, pointer, integer, number, pointer, pointer],
        "torchsat_features": [pointer, integer, pointer, pointer],
        "torchsat_squares": [pointer, pointer, integer, pointer],
    }
    for name, signature in signatures.items():
        function = getattr(library, name, None)
        if function is None:
            raise OSError(f"{path} lacks {name}")
        function.argtypes, function.restype = signature, None
    two, out = (ctypes.c_double * 2)(3.0, 4.0), (ctypes.c_double * 2)()
    library.torchsat_squares(ctypes.byref(_Vector(ctypes.addressof(two), 1, 1)), ctypes.byref(_NOTHING), 2, out)
    if out[0] != 25:
        raise OSError(f"{path} computes wrongly")
    return library
