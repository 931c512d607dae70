"""The attention core against its equations: values and every gradient."""

from __future__ import annotations

import os

import pytest
import torch
from attention_cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dattrain import ops
from dattrain.errors import UserError
from dattrain.ops.cpp import build
from dattrain.ops.deformable_attention import backend_torch, torch_op

needs_native = pytest.mark.skipif(not build.status()[0], reason="no C++ compiler")
BACKENDS = ["torch", pytest.param("native", marks=needs_native)]
NAMES = ("q", "k", "v", "positions", "table")


@pytest.fixture
def small() -> Case:
    """Non-square, two groups, some points outside."""
    return Case()


def run(case: Case, inputs, backend, cotangent=None):
    """Output and gradients (None for a missing table)."""
    out = ops.deform_attention(*inputs, **case.keywords, backend=backend)
    if cotangent is None:
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = [x for x in inputs if x is not None]
    return out, torch.autograd.grad(out, wanted, cotangent.to(out.dtype), allow_unused=True)


def assert_same(case: Case, backend: str = "torch", tolerance: float = 1e-10) -> None:
    inputs = case.inputs()
    expected, expected_grads = run(case, inputs, "reference")
    out, grads = run(case, inputs, backend)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    for name, grad, wanted in zip(NAMES, grads, expected_grads):
        wanted = torch.zeros_like(grad) if wanted is None else wanted
        torch.testing.assert_close(
            grad, wanted, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    groups = draw(st.integers(1, 3))
    height, width = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    natural = (2 * height - 1, 2 * width - 1)
    other = st.tuples(st.integers(1, 12), st.integers(1, 12))
    return Case(
        batch=draw(st.integers(0, 3)),
        groups=groups,
        heads=groups * draw(st.integers(1, 3)),
        height=height,
        width=width,
        keys=draw(st.integers(1, 9)),
        dim=draw(st.sampled_from([1, 4, 16])),
        table=draw(st.one_of(st.just(natural), other, st.none())),
        grid=draw(st.sampled_from(["center", "corner"])),
        spread=draw(st.sampled_from([0.9, 1.5, 6.0])),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=cases(), block=st.sampled_from([1, 700, 1 << 20]))
def test_values_and_all_gradients_equal_the_equations(case: Case, block: int) -> None:
    before = backend_torch.BLOCK_BYTES
    backend_torch.BLOCK_BYTES = block
    try:
        assert_same(case)
    finally:
        backend_torch.BLOCK_BYTES = before


@needs_native
@settings(max_examples=120, deadline=None, derandomize=True)
@given(case=cases())
def test_native_values_and_all_gradients_equal_the_equations(case: Case) -> None:
    assert_same(case, "native")


@needs_native
@pytest.mark.parametrize("width", [15, 16, 17, 33])
def test_native_rows_that_do_not_fill_vectors_and_maps_of_several_blocks(width: int) -> None:
    table = (79, 2 * width - 1)
    assert_same(
        Case(batch=1, heads=1, groups=1, height=40, width=width, keys=150, table=table, dim=5), "native"
    )


@needs_native
@pytest.mark.parametrize("grid", ["center", "corner"])
@pytest.mark.parametrize(
    ("height", "width", "keys", "table"),
    [(20, 13, 90, (27, 27)), (11, 40, 70, (27, 13)), (33, 18, 60, (7, 7)), (5, 6, 30, (27, 55)), (3, 1, 5, (9, 9))],
)  # fmt: skip
def test_native_tables_of_maps_of_another_size(
    height: int, width: int, keys: int, table: tuple[int, int], grid: str
) -> None:
    assert_same(
        Case(
            batch=1, heads=2, groups=1, height=height, width=width, keys=keys, table=table, dim=5, grid=grid
        ),
        "native",
    )


@needs_native
@pytest.mark.parametrize("table", [(27, 27), (59, 59), None])
def test_native_keys_in_tiles(table: tuple[int, int] | None) -> None:
    """More scores than a block holds: what is summed over keys goes on from tile to tile."""
    assert_same(Case(batch=1, heads=1, groups=1, height=30, width=30, keys=600, table=table, dim=5), "native")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grid", ["center", "corner"])
def test_the_map_of_stage_three(grid: str, backend: str) -> None:
    assert_same(
        Case(batch=2, heads=4, groups=2, height=14, width=14, keys=196, table=(27, 27), dim=32, grid=grid),
        backend,
    )


def test_whole_steps_use_windows_of_the_table_and_any_step_uses_rows() -> None:
    from dattrain.ops.deformable_attention.torch_bias import Rows, Windows, bias_builder

    positions = torch.rand(2, 36, 2)
    corner = bias_builder(torch.zeros(2, 11, 11), positions, 6, 6, slice(0, 6), "corner")
    center = bias_builder(torch.zeros(2, 11, 11), positions, 6, 6, slice(0, 6), "center")
    few_keys = bias_builder(torch.zeros(2, 111, 111), positions[:, :4], 56, 56, slice(0, 56), "corner")
    assert isinstance(corner, Windows) and isinstance(center, Rows) and isinstance(few_keys, Rows)


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_on_table_entries_have_the_gradient_of_grid_sample(backend: str) -> None:
    # A kink of the bilinear surface: which side's slope counts is convention, and must be the reference's.
    case = Case(batch=1, heads=2, groups=1, height=3, width=3, keys=4, table=(5, 5), grid="corner")
    q, k, v, _, table = case.inputs()
    positions = torch.tensor([[0.0, 0.0], [1.0, -1.0], [-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    positions = positions.view(1, 1, 4, 2).requires_grad_()
    inputs = [q, k, v, positions, table]
    expected = run(case, inputs, "reference")
    actual = run(case, inputs, backend)
    for a, b in zip([actual[0], *actual[1]], [expected[0], *expected[1]]):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_reference_is_the_equation_written_as_a_loop(small: Case) -> None:
    q, k, v, positions, table = [x.detach() for x in small.inputs()]
    out = ops.deform_attention(q, k, v, positions, table, **small.keywords, backend="reference")
    for h in range(small.heads):
        group = h // (small.heads // small.groups)
        for i in range(small.height):
            for j in range(small.width):
                query = (
                    torch.tensor([(i + 0.5) / small.height, (j + 0.5) / small.width], dtype=torch.float64) * 2
                    - 1
                )
                bias = []
                for key in positions[1, group]:
                    row, column = ((query - key) / 2 + 1) * torch.tensor([4.0, 8.0]).double() / 2
                    value = 0.0
                    for r in range(5):
                        for c in range(9):
                            weight = max(0.0, 1 - abs(row - r)) * max(0.0, 1 - abs(column - c))
                            value = value + weight * table[h, r, c]
                    bias.append(value)
                index = i * small.width + j
                logits = small.dim**-0.5 * (k[1, h] @ q[1, h, index]) + torch.stack(bias)
                torch.testing.assert_close(
                    out[1, h, index], logits.softmax(0) @ v[1, h], rtol=1e-12, atol=1e-12
                )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("table", [(3, 5), None])
@pytest.mark.parametrize("grid", ["center", "corner"])
def test_gradcheck(grid: str, table, backend: str) -> None:
    case = Case(
        batch=1, heads=2, groups=1, height=2, width=3, keys=3, dim=2, table=table, grid=grid, spread=0.93
    )
    inputs = [x for x in case.inputs() if x is not None]
    padding = [None] * (5 - len(inputs))
    assert torch.autograd.gradcheck(
        lambda *x: ops.deform_attention(*x, *padding, **case.keywords, backend=backend), inputs
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs(small: Case, backend: str) -> None:
    inputs = small.inputs()
    strided = [x.detach().transpose(1, -1).contiguous().transpose(1, -1).requires_grad_() for x in inputs]
    assert not any(x.is_contiguous() for x in strided)
    expected, expected_grads = run(small, inputs, "reference")
    out, grads = run(small, strided, backend, None)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    for a, b in zip(grads, expected_grads):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# Bounds on max |difference| / max |reference|, over output and gradients, at 14 x 14 with unit normal inputs: a few units
# of the dtype's rounding (bf16 2^-8, fp16 2^-11), since everything inside is fp32.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype, bound", [(torch.float32, 2e-5), (torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)]
)
def test_low_precision_stays_within_its_bound(dtype: torch.dtype, bound: float, backend: str) -> None:
    case = Case(batch=1, height=14, width=14, keys=196, table=(27, 27), dim=32, spread=1.0)
    inputs = case.inputs(dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected, expected_grads = run(case, exact, "reference")
    out, grads = run(case, inputs, backend)
    assert out.dtype == dtype and [g.dtype for g in grads[3:]] == [torch.float32] * 2
    for name, a, b in zip(("out", *NAMES), (out, *grads), (expected, *expected_grads)):
        assert ((a.double() - b).abs().max() / b.abs().max()).item() < bound, name


@needs_native
@pytest.mark.parametrize(
    ("height", "width", "table"),
    # Entries from column to column: .06, .17, .28, .46, .97 (sixteen columns fit sixteen entries now and then), 1.2, and one column.
    [
        (9, 50, (11, 5)),
        (9, 50, (11, 16)),
        (33, 18, (9, 9)),
        (12, 37, (13, 33)),
        (4, 60, (7, 115)),
        (5, 17, (9, 40)),
        (3, 1, (9, 9)),
    ],
)
def test_native_stretched_tables_in_fp32(height: int, width: int, table: tuple[int, int]) -> None:
    case = Case(height=height, width=width, keys=40, table=table, spread=1.2)
    inputs = case.inputs(torch.float32)
    exact = [x.detach().double().requires_grad_() for x in inputs if x is not None]
    (out, grads), (expected, expected_grads) = run(case, inputs, "native"), run(case, exact, "reference")
    for name, a, b in zip(("out", *NAMES), (out, *grads), (expected, *expected_grads)):
        assert ((a.double() - b).abs().max() / b.abs().max()).item() < 2e-5, name


def test_autocast_casts_queries_and_never_positions(small: Case) -> None:
    inputs = small.inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, grads = run(small, inputs, "torch")
    assert out.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in grads)
    cast = [x.detach().to(torch.bfloat16) for x in inputs[:3]] + inputs[3:]
    torch.testing.assert_close(
        out, ops.deform_attention(*cast, **small.keywords, backend="torch"), rtol=0, atol=0
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_operator_passes_torchs_checks(small: Case, backend: str) -> None:
    q, k, v, positions, table = small.inputs(torch.float32)
    for bias in (table, None):
        torch.library.opcheck(torch_op.attention, (q, k, v, positions, bias, 3, 5, "center", 0.3, backend))


def test_goes_through_export_checkpointing_and_flop_counting(small: Case) -> None:
    inputs = small.inputs()

    class Layer(torch.nn.Module):
        def forward(self, *x):
            return ops.deform_attention(*x, **small.keywords)

    program = torch.export.export(Layer(), tuple(inputs))
    assert torch.ops.dattrain.deform_attention.default in [node.target for node in program.graph.nodes]
    torch.testing.assert_close(program.module()(*inputs), Layer()(*inputs))
    plain = torch.autograd.grad(Layer()(*inputs).square().sum(), inputs)
    recomputed = torch.autograd.grad(checkpoint(Layer(), *inputs, use_reentrant=False).square().sum(), inputs)
    for a, b in zip(plain, recomputed):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    with FlopCounterMode(display=False) as counter:
        Layer()(*inputs).sum().backward()
    assert counter.get_total_flops() == 14 * 2 * 4 * 15 * 7 * 8


def test_compiles_without_a_graph_break(small: Case) -> None:
    inputs = small.inputs()
    compiled = torch.compile(
        lambda *x: ops.deform_attention(*x, **small.keywords), fullgraph=True, backend="aot_eager"
    )
    out, expected = compiled(*inputs), ops.deform_attention(*inputs, **small.keywords)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_matrix_of_queries_by_keys_is_kept_for_backward(backend: str) -> None:
    case = Case(batch=1, height=12, width=12, keys=144, table=(23, 23), dim=4)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        out = ops.deform_attention(*case.inputs(torch.float32), **case.keywords, backend=backend)
    assert out.requires_grad and kept and not any(144 in s[-1:] and 144 in s[:-1] for s in kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_every_time(backend: str) -> None:
    case = Case(batch=3, height=7, width=7, keys=49, table=(13, 13))
    first, second = (run(case, case.inputs(torch.float32), backend) for _ in range(2))
    for a, b in zip([first[0], *first[1]], [second[0], *second[1]]):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"height": 4}, "height\\*width"),
        ({"positions": torch.zeros(2, 2, 7, 2, dtype=torch.bfloat16)}, "positions are torch.bfloat16"),
        ({"positions": torch.zeros(2, 3, 7, 2)}, "4 heads cannot be shared by 3 groups"),
        ({"positions": torch.zeros(2, 2, 6, 2)}, "positions must be"),
        ({"bias_table": torch.zeros(3, 5, 9)}, "bias_table must be"),
        ({"bias_table": torch.zeros(4, 0, 9)}, "no empty side"),
        ({"k": torch.zeros(2, 4, 7, 8, dtype=torch.float16)}, "one float dtype"),
        ({"query_grid": "centre"}, "neither"),
        ({"q": torch.zeros(2, 4, 0, 8), "height": 0}, "height, width and head dim must be at least 1, not 0"),
        ({x: torch.zeros(2, 4, n, 0) for x, n in (("q", 15), ("k", 7), ("v", 7))}, "and 0$"),
        (
            {
                "k": torch.zeros(2, 4, 0, 8),
                "v": torch.zeros(2, 4, 0, 8),
                "positions": torch.zeros(2, 2, 0, 2),
            },
            "Ns=0",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(small: Case, change: dict, message: str) -> None:
    q, k, v, positions, table = small.inputs(torch.float32)
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "positions": positions,
        "bias_table": table,
        **small.keywords,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        ops.deform_attention(**arguments)


def test_choice_of_backend_argument_context_environment(small: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from dattrain.ops.dispatch import resolve

    q = torch.zeros(1, 1, 1, 4)
    monkeypatch.delenv("DATTRAIN_ATTENTION", raising=False)
    assert resolve(q, None) == "native"
    monkeypatch.setenv("DATTRAIN_ATTENTION", "reference")
    assert resolve(q, None) == "reference"
    with ops.use_backend("torch"):
        assert resolve(q, None) == "torch"
        assert resolve(q, "reference") == "reference"
    assert resolve(q, None) == "reference"
    monkeypatch.setenv("DATTRAIN_ATTENTION", "flash")
    with pytest.raises(UserError, match="DATTRAIN_ATTENTION=flash"):
        ops.deform_attention(*small.inputs(), **small.keywords)


def test_every_backend_says_whether_it_runs_here() -> None:
    listed = {status.name: status for status in ops.backends()}
    assert list(listed) == ["reference", "torch", "native", "triton"]
    assert listed["torch"].available and all(status.why for status in listed.values())
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") == "0":
        assert not listed["triton"].available
        with pytest.raises(UserError, match="triton cannot run here"), ops.use_backend("triton"):
            pass


def test_without_a_compiler_plain_torch_runs_and_asking_for_native_says_why(
    small: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = small.inputs()
    expected, expected_grads = run(small, inputs, "torch")
    monkeypatch.setenv("CXX", "/no/such/compiler")
    for cached in (build.status, build._compiled):
        cached.cache_clear()
    try:
        out, grads = run(small, inputs, None)
        with pytest.raises(UserError, match="native cannot run here.*no/such/compiler"):
            run(small, inputs, "native")
    finally:
        for cached in (build.status, build._compiled):
            cached.cache_clear()
    for a, b in zip((out, *grads), (expected, *expected_grads)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_position_that_is_not_finite_is_seen_in_the_output(
    small: Case, backend: str, broken: float, axis: int
) -> None:
    q, k, v, positions, table = (x.detach() for x in small.inputs(torch.float32))
    positions[0, 0, 3, axis] = broken
    out = ops.deform_attention(q, k, v, positions, table, **small.keywords, backend=backend)
    assert out[0, :2].isnan().all() and not out[0, 2:].isnan().any() and not out[1].isnan().any()


@needs_native
def test_native_threads_share_the_work_without_changing_it() -> None:
    case = Case(batch=3, height=7, width=7, keys=49, table=(13, 13))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(case, case.inputs(), "native"))
    finally:
        torch.set_num_threads(before)
    for out, grads in results[1:]:
        assert torch.equal(out, results[0][0])
        for a, b in zip(grads, results[0][1]):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
