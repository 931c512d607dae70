"""The ``native`` backend: ``native*.cpp``, compiled once per machine with the C++ compiler that is at hand, for CPUs.

Here are the compiling and the attention core; sampling, convolution and windows are in ``native_maps``. No headers of torch
are needed, so compiling takes seconds; the library is kept under ``$XDG_CACHE_HOME/dattrain`` (``~/.cache`` by default) by
source, compiler and CPU; where that cannot be written or nothing can be loaded from it, in a folder of the user's own
under ``$TMPDIR``. Where there is no compiler, ``torch`` is the CPU's backend.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from dattrain.ops.deformable_attention.coordinates import QueryGrid, start_and_step
from dattrain.ops.deformable_attention.layout import tokens_like

_HERE = Path(__file__).parent
SOURCES = tuple(_HERE / name for name in ("native.h", "native.cpp", "native_maps.cpp", "native_windows.cpp"))
_FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-ffp-contract=fast"]


@functools.cache
def status() -> tuple[bool, str]:
    """Whether the backend can run here and why (not); compiles if that has not been done on this machine."""
    try:
        path = _compiled()[1]
    except (OSError, subprocess.SubprocessError) as error:
        return False, (str(error).strip() or type(error).__name__).splitlines()[-1]
    return True, f"compiled for this CPU ({path}); the default on CPU"


def supports(height: int, width: int, table: Tensor | None, grid: QueryGrid, scale: float) -> bool:
    """Columns of queries must step by one table cell or a little less: both conventions, with tables of 2 * size - 1.

    Logits are scaled after their maximum is taken, so the scale must be positive.
    """
    if scale <= 0:
        return False
    if table is None or width == 1:
        return True
    step = start_and_step(width, table.shape[2], grid)[2]
    return step <= 1 and (1 - step) * (width - 1) <= 1


def library() -> ctypes.CDLL:
    """The compiled library.

    Raises:
        OSError: no compiler, no folder to keep the library in, or a library that does not load.
        subprocess.SubprocessError: the compiler failed.
    """
    return _compiled()[0]


@functools.cache
def _compiled() -> tuple[ctypes.CDLL, Path]:
    """The library and its file."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    if compiler is None:
        raise OSError("no C++ compiler (CXX, g++, clang++ or c++)")
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    arch = ["-mcpu=native"] if platform.machine() in ("arm64", "aarch64") else ["-march=native"]
    if platform.machine() in ("x86_64", "AMD64") and "clang" not in version.lower():
        arch.append("-mprefer-vector-width=512")
    key = hashlib.sha256(
        "\n".join([*(source.read_text() for source in SOURCES), version, *_FLAGS, *arch, _cpu()]).encode()
    ).hexdigest()[:16]
    failures = []
    for folder in (_user_cache, _own_temporary):
        try:
            path = folder() / f"core-{key}.so"
            if not path.exists():
                _compile(compiler, arch, path)
            return _loaded(path), path
        except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
            failures.append(str(error))
    raise OSError("; ".join(failures))


def _user_cache() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dattrain"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _own_temporary() -> Path:
    """A folder that only this user can write: code is loaded from it, and anyone may have made one of its name."""
    user = os.getuid()
    folder = Path(tempfile.gettempdir()) / f"dattrain-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o022:
        raise OSError(f"{folder} is not this user's alone")
    return folder


def _compile(compiler: str, arch: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        built = Path(scratch) / path.name
        units = [str(source) for source in SOURCES if source.suffix == ".cpp"]
        # A compiler may come without OpenMP; threads are then started for every call.
        for openmp in (["-fopenmp"], []):
            command = [compiler, *_FLAGS, *openmp, *arch, *units, "-o", str(built)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            if not done.returncode:
                break
        else:
            # No fault of the folder: in another one it would fail as well.
            why = done.stderr.strip().splitlines()[-1:]
            raise subprocess.SubprocessError(f"{compiler} cannot compile {units}: {why}")
        # Ranks may all compile at once; the last to finish wins, with the same bytes.
        built.replace(path)


def _loaded(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    for function in (loaded.dattrain_core_f32, loaded.dattrain_core_f64, loaded.dattrain_core_bf16):
        function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 2
        function.restype = ctypes.c_int
    for name, numbers in (("sample", []), ("depthwise", []), ("windows", [ctypes.c_double])):
        for dtype in ("f32", "f64", "bf16"):
            function = getattr(loaded, f"dattrain_{name}_{dtype}")
            function.argtypes = [ctypes.c_void_p] * 2 + numbers + [ctypes.c_int64]
            function.restype = ctypes.c_int
    return loaded


def _cpu() -> str:
    """What -march=native depends on: a cache folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    table: Tensor | None,
    height: int,
    width: int,
    grid: QueryGrid,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output (as q, laid out as tokens) and log-sum-exp (B x heads x queries, positions' dtype)."""
    stored = _stored(q, positions)
    out = tokens_like(q, stored)
    lse = positions.new_empty(q.shape[:3])
    _call(q, k, v, positions, table, out, lse, None, (None,) * 3, None, None, height, width, grid, scale)
    return out.to(q.dtype), lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    table: Tensor | None,
    out: Tensor,
    lse: Tensor,
    height: int,
    width: int,
    grid: QueryGrid,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v (laid out as tokens), positions and table."""
    batch, heads = q.shape[:2]
    groups, keys = positions.shape[1:3]
    grads = tuple(tokens_like(x, _stored(q, positions)) for x in (q, k, v))
    per_head = positions.new_zeros(batch, heads, keys, 2)
    threads = max(1, min(torch.get_num_threads(), batch * heads))
    tables = None if table is None else positions.new_zeros(threads, *table.shape)
    _call(q, k, v, positions, table, out, lse, grad_out, grads, per_head, tables, height, width, grid, scale)
    grad_q, grad_k, grad_v = (x.to(like.dtype) for x, like in zip(grads, (q, k, v)))
    grad_positions = per_head.view(batch, groups, heads // groups, keys, 2).sum(2)
    return grad_q, grad_k, grad_v, grad_positions, None if tables is None else tables.sum(0)


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    table: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor | None,
    grads: tuple[Tensor | None, ...],
    grad_positions: Tensor | None,
    grad_tables: Tensor | None,
    height: int,
    width: int,
    grid: QueryGrid,
    scale: float,
) -> None:
    if not q.shape[0]:
        return
    dtype = _stored(q, positions)
    out = out.to(dtype)
    inputs = [_rows(x.to(dtype)) for x in (q, k, v, out)]
    matrices = [*inputs, *(None if x is None else _rows(x.to(dtype)) for x in (grad_out, *grads))]
    strides = [n for x in matrices for n in ((0, 0, 0) if x is None else x.stride()[:3])]
    table = None if table is None else table.contiguous()
    table_shape = (1, 1) if table is None else table.shape[1:]
    memory = [
        *inputs[:3], positions.contiguous(), table, inputs[3], lse.contiguous(), matrices[4], *matrices[5:],
        grad_positions, grad_tables,
    ]  # fmt: skip
    sizes = [q.shape[0], q.shape[1], positions.shape[1], height, width, k.shape[2], q.shape[3], *table_shape]
    numbers = [
        *start_and_step(height, table_shape[0], grid),
        *start_and_step(width, table_shape[1], grid),
        scale,
    ]
    functions = {
        torch.float32: library().dattrain_core_f32,
        torch.float64: library().dattrain_core_f64,
        torch.bfloat16: library().dattrain_core_bf16,
    }
    failed = functions[dtype](
        (ctypes.c_void_p * len(memory))(*(None if x is None else x.data_ptr() for x in memory)),
        (ctypes.c_int64 * len(strides))(*strides),
        (ctypes.c_int64 * len(sizes))(*sizes),
        (ctypes.c_double * len(numbers))(*numbers),
        grad_out is not None,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("the native attention core could not allocate its work space")


def _stored(q: Tensor, positions: Tensor) -> torch.dtype:
    """What the library reads and writes q and the like in: bf16 as it is, everything else in the dtype of positions."""
    narrow = q.dtype == torch.bfloat16 and positions.dtype == torch.float32
    return torch.bfloat16 if narrow else positions.dtype


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
