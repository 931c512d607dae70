"""The C++ library of the ``native`` backend: compiled once per machine with the compiler that is at hand, then loaded.

No headers of torch are needed, so compiling takes seconds; the library is kept under ``$XDG_CACHE_HOME/dattrain``
(``~/.cache`` by default) by source, compiler and CPU; where that cannot be written or nothing can be loaded from it, in a
folder of the user's own under ``$TMPDIR``. Where there is no compiler, ``torch`` is the CPU's backend.
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

_HERE = Path(__file__).parent
SOURCES = tuple(sorted([*_HERE.glob("*.h"), *_HERE.glob("*.cpp")]))
_FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-ffp-contract=fast"]


@functools.cache
def status() -> tuple[bool, str]:
    """Whether the backend can run here and why (not); compiles if that has not been done on this machine."""
    try:
        loaded, path = _compiled()
    except (OSError, subprocess.SubprocessError) as error:
        return False, (str(error).strip() or type(error).__name__).splitlines()[-1]
    tiles = ", with its tile unit (AMX)" if loaded.dattrain_tile_unit() else ""
    return True, f"compiled for this CPU{tiles} ({path}); the default on CPU"


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
            lines = done.stderr.strip().splitlines()
            why = next((line for line in lines if "error" in line.lower()), *lines[-1:])
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
