"""The Triton kernels: in Triton's interpreter anywhere, on the device where there is one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import Case
from interpreter import needs_interpreter
from test_attention import NAMES, run

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


@pytest.fixture(scope="module")
def interpreted(request: pytest.FixtureRequest) -> str:
    """What the checks in the interpreter print. A process of its own: triton reads TRITON_INTERPRET when it is imported."""
    full = ["--full"] if request.config.getoption("--full") else []
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "run_triton_interpreted.py"), *full],
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


@needs_interpreter
def test_kernels_equal_the_equations_in_the_interpreter(interpreted: str) -> None:
    assert "attention: all equal" in interpreted, interpreted


@needs_interpreter
def test_sampling_equals_grid_sample_in_the_interpreter(interpreted: str) -> None:
    assert "sampling: all equal" in interpreted, interpreted


def compile_and_check(*arguments: str) -> str:
    """Run ``python -m benchmarks.kernels --check``: compile what would be launched, and read the machine code."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "benchmarks.kernels", "--check", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("side", "most"), [(14, 132), pytest.param(24, 120, marks=pytest.mark.full)])
def test_machine_code_spills_little_and_takes_no_more_instructions_than_agreed(
    tmp_path: Path, side: int, most: int
) -> None:
    compile_and_check(
        "--capability", "90", "--map", f"{side}x{side}", "--json", str(tmp_path / "counts.json")
    )
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts.keys() == {f"{side}x{side}"} and counts[f"{side}x{side}"]["sum"] <= most
    for case in counts.values():
        assert case["sum"] == pytest.approx(sum(n for name, n in case.items() if name != "sum"), abs=0.1)
        assert min(case[name] for name in ("forward_kernel", "backward_kernel", "table_gradient_kernel")) > 10


@pytest.mark.full
@pytest.mark.parametrize("capability", ["80", "89", "90", "100"])
def test_machine_code_of_the_matrix(capability: str) -> None:
    compile_and_check(
        "--capability",
        capability,
        "--map",
        "14x14",
        "--head-dim",
        "16",
        "32",
        "64",
        "--dtype",
        "bf16",
        "fp16",
    )
    compile_and_check(
        "--capability", capability, "--map", "14x14", "--head-dim", "128", "--dtype", "bf16", "fp32"
    )
    compile_and_check("--capability", capability, "--map", "7x7", "12x12", "24x24", "28x28", "56x56")


@pytest.mark.full
def test_dense_maps_cost_no_more_per_score_than_a_square_one(tmp_path: Path) -> None:
    """Tables of 224 px stretched over maps; and what was compiled for one size serves the next."""
    maps = ["64x64", "50x80", "32x128", "25x40", "100x160", "200x320"]
    compile_and_check("--map", *maps, "--json", str(tmp_path / "counts.json"))
    sums = {
        name: kernels["sum"] for name, kernels in json.loads((tmp_path / "counts.json").read_text()).items()
    }
    assert max(sums["50x80"], sums["32x128"]) <= 1.2 * sums["64x64"] and max(sums.values()) <= 130
    several = compile_and_check("--map", "50x80", "48x80", "50x96", "50x64", "34x96")
    kernels = re.search(r"(\d+) kernels were compiled", several)
    assert kernels and int(kernels[1]) <= 25, several  # one by one they are 39


@needs_interpreter
@pytest.mark.parametrize("budget", [10**9, 5000, 2000, 1500, 900, 500, 300, 1])
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4), (3, 1)])
def test_pieces_of_the_scores_gradient_cover_it_once_and_fit(
    monkeypatch: pytest.MonkeyPatch, budget: int, heads: int, groups: int
) -> None:
    from dattrain.ops.deformable_attention import triton_tiles

    batch, keys, share = 3, 150, heads // groups
    monkeypatch.setattr(triton_tiles, "SCORES_BYTES", budget)
    made = triton_tiles.pieces(batch, heads, groups, keys, 2)
    count = torch.zeros(batch, heads, keys, dtype=torch.int64)
    for piece in made:
        count[piece.keys] += 1
        some = range(heads)[piece.heads]
        assert range(groups)[piece.groups] == range(some[0] // share, some[-1] // share + 1)
        assert len(some) <= share or len(some) % share == 0
        assert count[piece.keys].numel() <= count[made[0].keys].numel()
    assert (count == 1).all() and count[made[0].keys].numel() * 2 <= max(budget, 64 * 2)


@pytest.mark.gpu
@pytest.mark.parametrize("grid", ["center", "corner"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "heads, groups, side, keys, dim",
    [(4, 2, 14, 196, 32), (4, 1, 24, 576, 32), (6, 2, 7, 49, 32), (2, 2, 14, 50, 64), (2, 1, 9, 70, 20)],
)
def test_kernels_equal_the_equations_on_the_device(
    heads: int, groups: int, side: int, keys: int, dim: int, dtype: torch.dtype, grid: str
) -> None:
    bound = {torch.float32: 5e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    table = (2 * side - 1, 2 * side - 1)
    case = Case(
        batch=2,
        heads=heads,
        groups=groups,
        height=side,
        width=side,
        keys=keys,
        table=table,
        dim=dim,
        grid=grid,
        smooth=True,
    )
    inputs = [x.detach().cuda().requires_grad_() for x in case.inputs(dtype)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(2, heads, side * side, dim, generator=generator, dtype=torch.float64).cuda()
    expected = run(case, exact, "reference", cotangent)
    out, again = run(case, inputs, "triton", cotangent), run(case, inputs, "triton", cotangent)
    for name, a, b, c in zip(
        ("out", *NAMES), (out[0], *out[1]), (expected[0], *expected[1]), (again[0], *again[1])
    ):
        assert ((a.double() - b).abs().max() / b.abs().max()).item() < bound, name
        assert torch.equal(a, c), f"{name}: the same inputs must give the same bits"
