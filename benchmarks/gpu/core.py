"""Stage ``core``: microseconds of the deformable core at the layers of DAT and DAT++, beside other formulations and the bound.

Batches are those of training, q, k and v lie as the model makes them, and the times are the device's own
(``dattrain.bench.device``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu import formulations
from benchmarks.gpu.job import Job
from dattrain import ops
from dattrain.bench import attention, common
from dattrain.observe import roofline

PLAIN = "compiled straightforward"


@dataclass(frozen=True)
class Layer:
    """A deformable layer: ``size`` x ``size`` queries, ``keys`` x ``keys`` keys, heads of 32."""

    name: str
    size: int
    keys: int
    heads: int
    groups: int
    batch: int
    grid: str = "center"

    @property
    def scores(self) -> int:
        """Scores of a micro-batch."""
        return self.batch * self.heads * self.size**2 * self.keys**2


LAYERS = (
    Layer("14x14", 14, 14, 12, 3, 128),
    Layer("24x24", 24, 24, 16, 4, 32),
    Layer("7x7", 7, 7, 24, 6, 128),
    Layer("12x12", 12, 12, 32, 8, 32),
    Layer("DAT-B 14x14", 14, 14, 16, 4, 128),
    Layer("DAT++ 56x56", 56, 7, 2, 1, 128, "corner"),
    Layer("DAT++ 28x28", 28, 7, 4, 2, 128, "corner"),
    Layer("DAT++ 14x14", 14, 7, 8, 4, 128, "corner"),
)
"""DAT-T's third stage at 224 pixels, DAT-B's at 384, their fourth, DAT-B's third at 224; DAT++-T's first three."""
DIM = 32


def run(job: Job) -> None:
    """Every layer in bf16, in order, while there is time."""
    device, dtype = attention.pick_device(job.device), torch.float32 if job.dry else torch.bfloat16
    ceilings = roofline.measure(device, dtype)
    layers = (
        (Layer("14x14", 4, 4, 2, 1, 1), Layer("DAT++ 56x56", 6, 3, 2, 1, 1, "corner")) if job.dry else LAYERS
    )
    longest = 0.0
    for layer in layers:
        before = job.left()
        if before < longest:
            print(f"no time for {layer.name} and what comes after it", flush=True)
            break
        measure(job, layer, dtype, device, ceilings)
        longest = max(longest, before - job.left())


def measure(
    job: Job, layer: Layer, dtype: torch.dtype, device: torch.device, ceilings: roofline.Ceilings
) -> None:
    """One layer, forward, and forward with backward."""
    torch._dynamo.reset()
    inputs = attention.draw(
        layer.size, layer.batch, layer.heads, layer.groups, DIM, dtype, device, keys=layer.keys
    )
    plain = attention.straightforward()
    assert plain is not None  # this file and it are of one tree
    mine = "triton" if device.type == "cuda" else "torch"
    notes: list[str] = []
    contenders: dict[str, Callable[..., torch.Tensor]] = {}
    if not job.dry:
        for name, call in (
            (PLAIN, plain.deform_attention),
            ("materialised bias, SDPA, compiled", formulations.sdpa),
        ):
            if compiled := attention.try_compile(call, notes, (inputs, layer.size, layer.grid)):
                contenders[name] = compiled
    # Compiling for a CPU takes as long as everything else here.
    contenders = contenders or {
        "straightforward": plain.deform_attention,
        "materialised bias, SDPA": formulations.sdpa,
    }
    for backward in (False, True):
        passes = "forward+backward" if backward else "forward"
        calls = dict(contenders)
        given = inputs if backward else tuple(x.detach() for x in inputs)
        if runs(formulations.flex, given, layer, backward, notes):
            calls["FlexAttention"] = formulations.flex
        calls[mine] = attention.with_backend(ops.deform_attention, mine)
        rows = attention.measure(
            f"{layer.name} B{layer.batch} {passes}", calls, given, layer.size, layer.grid, backward,
            rounds=1 if job.dry else 5, notes=notes, min_seconds=0.001 if job.dry else 0.03,
        )  # fmt: skip
        report(job, layer, passes, {row.name: row for row in rows}, mine, ceilings)
    kept = [
        attention.kept_bytes(call, inputs, layer.size, layer.grid)
        for call in (attention.with_backend(ops.deform_attention, mine), plain.deform_attention)
    ]
    job.figure(f"{layer.name}: bytes kept for backward, straightforward = 1", kept[0] / kept[1])
    for note in dict.fromkeys(notes):
        print(f"{layer.name}: {note}", flush=True)


def runs(
    call: Callable[..., Any], inputs: tuple[Any, ...], layer: Layer, backward: bool, notes: list[str]
) -> bool:
    """Whether this torch can do it and gets what the equations say; else a line in ``notes``."""
    same: dict[str, Any] = {"height": layer.size, "width": layer.size, "query_grid": layer.grid}
    try:
        attention.step(call, attention.leaves_like(inputs), layer.size, layer.grid, backward)()
        with torch.no_grad():
            got = call(*(x.detach() for x in inputs), **same)
            wanted = ops.deform_attention(*inputs, **same, backend="reference")
    except Exception as error:
        notes.append(f"FlexAttention not run: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
        return False
    off = ((got - wanted).abs().max() / wanted.abs().max()).item()
    if not off < 3e-2:
        notes.append(f"FlexAttention not run: it is {off:.2g} from the equations")
    return bool(off < 3e-2)


def report(
    job: Job,
    layer: Layer,
    passes: str,
    rows: dict[str, common.Measurement],
    mine: str,
    ceilings: roofline.Ceilings,
) -> None:
    """Microseconds of all, and of ours the ratios."""
    where = f"{layer.name} {passes}"
    for name, row in rows.items():
        job.figure(f"{where}: {name}", row.wall.median * 1e6, "us")
    least = bound(layer, passes != "forward", ceilings)
    job.figure(f"{where}: bound of memory and products", least * 1e6, "us")
    job.figure(f"{where}: times the bound", rows[mine].wall.median / least, "times")
    if PLAIN in rows:
        job.figure(f"{where}: speed, {PLAIN} = 1", rows[PLAIN].wall.median / rows[mine].wall.median, "times")


def bound(layer: Layer, backward: bool, ceilings: roofline.Ceilings) -> float:
    """Seconds that the core cannot fall below: its products (2 forward, 5 backward) or its tensors, each moved once."""
    tokens = layer.batch * layer.heads * DIM * 2
    queries, keys = tokens * layer.size**2, tokens * layer.keys**2
    forward = ceilings.seconds(2 * 2 * DIM * layer.scores, 2 * queries + 2 * keys)
    # Backward reads q, k, v, the output and its gradient, and writes three gradients.
    return forward + (
        ceilings.seconds(5 * 2 * DIM * layer.scores, 4 * queries + 4 * keys) if backward else 0.0
    )
