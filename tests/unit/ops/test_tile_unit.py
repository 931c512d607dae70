"""Products by the tile unit (AMX), its instructions emulated: the same numbers as by vectors, and vectors where it cannot be used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_native_bf16 import results

HERE = Path(__file__).parent


def has_pairs() -> bool:
    """What the unit multiplies is packed for AVX-512 BF16, which every CPU with the unit has; without it none of that is compiled."""
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and "avx512_bf16" in cpu.read_text() and shutil.which("g++") is not None


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A compiler that is given the emulation before every source."""
    folder = tmp_path_factory.mktemp("tiles")
    compiler = folder / "c++"
    compiler.write_text(f'#!/bin/sh\nexec g++ -include {HERE / "emulated_tiles.h"} "$@" -O1\n')
    compiler.chmod(0o755)
    return {
        **os.environ,
        "CXX": str(compiler),
        "XDG_CACHE_HOME": str(folder),
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
    }


@pytest.mark.skipif(not has_pairs(), reason="no g++, or this CPU does not multiply pairs of bf16")
@pytest.mark.parametrize("how", ["right", "refused", "wrong"])
def test_products_by_the_tile_unit(tmp_path: Path, environment: dict[str, str], how: str) -> None:
    out = tmp_path / "results.pt"
    done = subprocess.run(
        [sys.executable, HERE / "run_native_bf16.py", out], env={**environment, "EMULATED_TILES": how}, capture_output=True, text=True,
    )  # fmt: skip
    assert not done.returncode, done.stdout + done.stderr
    said, products = done.stdout.splitlines()[-2:]
    assert ("with its tile unit" in said) == (how == "right")
    # Where products are wrong, those of the first look.
    assert {"right": 1000, "refused": 0, "wrong": 1}[how] <= int(products.removeprefix("products: ")) < {"right": 10**6, "refused": 1, "wrong": 100}[how]  # fmt: skip
    by_vectors = results()
    for name, found in torch.load(out).items():
        for x, y in zip(found, by_vectors[name], strict=True):
            # Sums in another order, by another compilation: roundings of fp32, and now and then of what is written in bf16.
            rounding = 2**-7 if x.dtype == torch.bfloat16 else 1e-3
            assert (x - y).abs().max() <= rounding * y.abs().max(), name
            assert x.dtype != torch.bfloat16 or (x != y).float().mean() < 0.03, name
