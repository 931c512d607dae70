"""The throughput table: many models, each at its own resolution and alone with the baseline, so that the largest fits too.

All that stays in memory is the baseline; each row's model is built for its turns and dropped. A ratio is of images/s, the row's
at its resolution against the baseline's at 224 pixels.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence

import torch

from dattrain.bench import common, model
from dattrain.bench.defaults import TABLE, Row
from dattrain.engine.memory import Ledger
from dattrain.runtime import host_memory

V100 = "V100 images/s (Swin paper)"
"""The column of what others measured elsewhere."""


def bench(
    models: Sequence[str], settings: model.Settings, *, most_seconds: float, rows: Sequence[Row] = TABLE
) -> common.BenchReport:
    """Time every row against the baseline at 224 pixels; what cannot be, or would take too long, is a row that says why.

    Args:
        models: further rows, each at every size of ``settings``.
        settings: ``sizes`` are of ``models`` alone.
        most_seconds: a row whose first turn takes longer has no more of them.
        rows: the table.

    Raises:
        UserError: no such model, or one that cannot be built for a size.
    """
    baseline, batch, device = settings.baseline, settings.images, settings.device
    wanted = [*rows, *(Row(name, size) for name in models for size in settings.sizes)]
    if settings.straightforward:
        wanted += [row._replace(model=row.model + model.PLAIN) for row in wanted if model.is_ours(row.model)]
    wanted = [row for row in dict.fromkeys(wanted) if (row.model, row.img_size) != (baseline, 224)]
    printed = {(row.model, row.img_size): row.v100 for row in rows}
    notes: list[str] = []
    report = common.BenchReport(
        "Throughput table",
        [],
        item="image",
        notes=notes,
        machine=common.describe_machine(str(device)),
    )
    for direction, dtype in settings.cases:
        case, train = f"B{batch} {dtype} {direction}", direction == "training"

        def make(name: str, size: int, dtype: str = dtype, train: bool = train) -> model.Contender:
            made = model.contender(name, settings, size=size, dtype=dtype, train=train, notes=notes)
            own: model.Columns = {"px": size, V100: _as_printed(printed.get((name, size)))}
            return made._replace(columns={**own, **made.columns})

        torch._dynamo.reset()
        beside = make(baseline, 224)
        first: common.Measurement | None = None
        for row in wanted:
            gc.collect()  # what the last row left
            torch._dynamo.reset()
            name = shown(row)
            reason = too_large(row, batch=batch, train=train, device=device)
            measured: list[common.Measurement] = []
            if reason is None:
                try:
                    one = make(row.model, row.img_size)
                    took = _seconds(one.turn, device)
                    if took > most_seconds:
                        reason = f"a first turn took {took:.0f} s, more than {most_seconds:g}"
                    else:
                        measured = model.compare(case, {baseline: beside, name: one}, settings)
                except torch.OutOfMemoryError as error:
                    reason = f"out of memory: {str(error).splitlines()[0]}"
                one = None  # type: ignore[assignment]  # its model goes before the next one comes
            if reason is not None:
                told = {"px": row.img_size, V100: _as_printed(row.v100)}
                report.unmeasured.append(common.Unmeasured(case, name, reason, told))
                continue
            # The baseline's turns beside the first row stand for it; ratios are of each row's own.
            report.measurements += measured if first is None else measured[1:]
            first = first or measured[0]
    notes[:] = [*dict.fromkeys(notes), *remarks(baseline)]
    return report


def shown(row: Row) -> str:
    """A row's name; its resolution is said where it is not 224 and the model's name does not say it."""
    plain = row.img_size == 224 or row.model.endswith(f"_{row.img_size}")
    return row.model if plain else f"{row.model} at {row.img_size} px"


def _as_printed(figure: float | None) -> str | None:
    """Not rounded: the paper's digits."""
    return None if figure is None else f"{figure:g}"


def remarks(baseline: str) -> list[str]:
    """What a reader must know of the columns and of what is missing."""
    return [
        f"Ratios are of images/s against {baseline} at 224 px, which took turns with each row; px is the row's own resolution.",
        f"{V100}: printed in Liu et al., Swin Transformer, ICCV 2021, Table 1, measured there on one V100; nobody measured it here, and no "
        "ratio has anything to do with it.",
        "Not in timm, so not here: the first PVT (PVT v2 is), GLiT and DPT of the DAT paper's table.",
    ]


def too_large(row: Row, *, batch: int, train: bool, device: torch.device) -> str | None:
    """Why a row does not fit the host's free memory, None if it does. A GPU's allocator says so by itself.

    A process that takes more than there is would be killed, so it is known before: from the sizes of all that fp32 would make.
    """
    if device.type == "cuda":
        return None
    need, free = needed(row.model, row.img_size, batch, train), host_memory.available()
    return (
        f"it needs {need / 1e9:.1f} GB of memory, and {free / 1e9:.1f} are free"
        if need > 0.9 * free
        else None
    )


def needed(name: str, size: int, batch: int, train: bool) -> int:
    """Bytes at the worst moment of a turn in fp32, weights and gradients included; followed on the meta device."""
    with torch.device("meta"):
        network = model.build(name, size, 0.0, torch.device("meta")).train(train)
        images = torch.empty(batch, 3, size, size)
    ledger = Ledger([*network.parameters(), *network.buffers()])
    with torch.set_grad_enabled(train), ledger:
        logits = network(images)
        if train:
            logits.float().sum().backward()
    return ledger.peak + sum(t.nbytes for t in [*network.parameters(), *network.buffers()])


def _seconds(turn: model.Turn, device: torch.device) -> float:
    begin = time.perf_counter()
    turn()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
