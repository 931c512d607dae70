"""Neighbourhood attention against a loop over queries written from NATTEN's border rule."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dattrain.ops import neighborhood
from dattrain.ops.neighborhood import neighborhood_attention, window_start


def naive(q, k, v, table, size, scale):
    batch, heads, height, width, _ = q.shape
    rows = []
    for y in range(height):
        for x in range(width):
            y0 = min(max(y - size // 2, 0), max(height - size, 0))
            x0 = min(max(x - size // 2, 0), max(width - size, 0))
            y1, x1 = min(y0 + size, height), min(x0 + size, width)
            logits = (q[:, :, y, x, None] * k[:, :, y0:y1, x0:x1].flatten(2, 3)).sum(-1) * scale
            if table is not None:
                top, left = y0 - y + size - 1, x0 - x + size - 1
                logits = logits + table[:, top : top + y1 - y0, left : left + x1 - x0].flatten(1)
            rows.append((logits.softmax(-1)[..., None] * v[:, :, y0:y1, x0:x1].flatten(2, 3)).sum(2))
    return torch.stack(rows, 2).reshape(batch, heads, height, width, -1)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(7, 7, 7), (14, 14, 7), (9, 16, 5), (13, 8, 7), (3, 10, 7), (2, 2, 5), (1, 4, 3)],
)
@pytest.mark.parametrize("biased", [True, False])
def test_values_and_gradients_equal_the_loop(height, width, size, biased):
    generator = torch.Generator().manual_seed(height * 100 + width)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()  # noqa: E731
    q, k, v = (draw(2, 3, height, width, 4) for _ in range(3))
    table = draw(3, 2 * size - 1, 2 * size - 1) if biased else None
    inputs = [t for t in (q, k, v, table) if t is not None]
    ours = neighborhood_attention(q, k, v, table, kernel_size=size)
    theirs = naive(q, k, v, table, size, 4**-0.5)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, cotangent), torch.autograd.grad(theirs, inputs, cotangent)
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def starts(size, kernel_size):
    return window_start(torch.arange(size), size, kernel_size).tolist()


def test_window_shifts_inside_at_the_border():
    assert starts(8, 5) == [0, 0, 0, 1, 2, 3, 3, 3]
    assert starts(3, 7) == [0, 0, 0]


def attend(size=9, training=True):
    x = torch.randn(1, 2, size, size, 4, generator=torch.Generator().manual_seed(0), requires_grad=training)
    table = torch.randn(2, 9, 9, generator=torch.Generator().manual_seed(1))
    return x, neighborhood_attention(x, x, x, table, kernel_size=5)


def test_indices_are_made_once_wherever_they_are_first_wanted(monkeypatch):
    monkeypatch.setattr(neighborhood, "_kept", {})
    with torch.inference_mode():
        _, first = attend(training=False)
    (kept,) = neighborhood._kept.values()
    x, second = attend()
    second.sum().backward()  # inference's own tensors could not be saved for it
    assert torch.equal(first, second) and x.grad.isfinite().all()
    monkeypatch.setattr(neighborhood, "_tiles_on", lambda *a: pytest.fail("made again"))
    attend()
    assert neighborhood._kept == {(9, 5, torch.device("cpu")): kept}


def test_fake_tensors_neither_meet_nor_become_the_kept_indices(monkeypatch):
    monkeypatch.setattr(neighborhood, "_kept", {})
    with FakeTensorMode():
        x = torch.empty(1, 2, 9, 9, 4)
        neighborhood_attention(x, x, x, None, kernel_size=5)
        assert not neighborhood._kept
    attend()
    with FakeTensorMode():
        x = torch.empty(1, 2, 9, 9, 4)
        neighborhood_attention(x, x, x, None, kernel_size=5)


def test_a_compiled_graph_makes_its_indices_on_the_device(monkeypatch):
    """Constants on the CPU would keep a compiled block out of a CUDA graph."""
    monkeypatch.setattr(neighborhood, "_kept", {})
    attend()  # kept ones are not what the compiler sees
    graphs = []

    def backend(graph, inputs):
        graphs.append((graph, inputs))
        return graph.forward

    torch._dynamo.reset()
    x, table = torch.randn(1, 2, 9, 9, 4), torch.randn(2, 9, 9)
    compiled = torch.compile(neighborhood_attention, backend=backend, fullgraph=True)
    found = compiled(x, x, x, table, kernel_size=5)
    assert torch.equal(found, neighborhood_attention(x, x, x, table, kernel_size=5))
    ((graph, inputs),) = graphs
    assert len([i for i in inputs if isinstance(i, torch.Tensor)]) == 2
    assert not list(graph.buffers()) and not [n for n in graph.graph.nodes if n.op == "get_attr"]


# Logits near 40 are rounded to 1/4 in bfloat16 and 1/32 in float16 before they are widened.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.15), (torch.float16, 0.03)])
def test_half_precision_keeps_logits_wide(dtype, bound):
    # q k^T is about 4e5 here: past float16's range, though the scaled difference between keys is not.
    q = torch.full((1, 1, 5, 5, 32), 100.0, dtype=dtype)
    k = (
        torch.linspace(100, 140, 25, dtype=torch.float32)
        .reshape(1, 1, 5, 5, 1)
        .expand(-1, -1, -1, -1, 32)
        .to(dtype)
    )
    v = torch.randn(1, 1, 5, 5, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = neighborhood_attention(q, k, v, torch.zeros(1, 9, 9), kernel_size=5, scale=1e-4)
    assert out.dtype == dtype and out.isfinite().all()
    wide = neighborhood_attention(
        q.double(), k.double(), v.double(), torch.zeros(1, 9, 9).double(), kernel_size=5, scale=1e-4
    )
    assert (out.double() - wide).abs().max() < bound


def test_bad_arguments_are_refused():
    x = torch.zeros(1, 2, 4, 4, 3)
    with pytest.raises(ValueError, match="odd"):
        neighborhood_attention(x, x, x, None, kernel_size=4)
    with pytest.raises(ValueError, match="bias table"):
        neighborhood_attention(x, x, x, torch.zeros(2, 3, 3), kernel_size=3)
