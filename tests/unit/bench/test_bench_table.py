"""The throughput table: every row is a model that there is, has the printed figure beside it, and is told where it was not measured."""

from __future__ import annotations

from dataclasses import replace

import timm
import torch
from pytest import MonkeyPatch, approx

from dattrain.bench import model, model_table
from dattrain.bench.defaults import BASELINE, TABLE, Row
from dattrain.runtime import host_memory

SETTINGS = model.Settings(
    baseline="resnet10t", straightforward=False, sizes=[64], batch=1, dtypes=["fp32"], directions=["inference"], drop_path=0.0,
    compile=False, channels_last=False, device=torch.device("cpu"), rounds=1,
)  # fmt: skip


def test_every_row_is_a_model_that_there_is() -> None:
    assert all(model.is_ours(row.model) or timm.is_model(row.model) for row in TABLE)
    assert len(set(TABLE)) == len(TABLE) and any(row.model == BASELINE for row in TABLE)
    # Those that are made for one size have it in their names.
    assert all(
        row.img_size == int(row.model[-3:])
        for row in TABLE
        if row.model[-3:].isdigit() and "_patch" in row.model
    )


def test_rows_have_their_own_size_and_the_printed_figure_and_none_is_missing(
    monkeypatch: MonkeyPatch,
) -> None:
    rows = [Row("dat_atto", 32, 1156.7), Row("resnet10t", 64), Row("test_vit", 160), Row("dat_atto", 64)]
    monkeypatch.setattr(
        model_table, "too_large", lambda row, **_: "too large" if row.model == "test_vit" else None
    )
    report = model_table.bench([], SETTINGS, most_seconds=60.0, rows=rows)
    assert [(m.name, m.extra["px"], m.extra[model_table.V100]) for m in report.measurements] == [
        ("resnet10t", 224, None), ("dat_atto at 32 px", 32, "1156.7"), ("resnet10t at 64 px", 64, None), ("dat_atto at 64 px", 64, None),
    ]  # fmt: skip
    page = report.as_markdown()
    assert "| test_vit at 160 px | not measured: too large |" in page and "Liu et al." in page
    widths = {line.count("|") for line in page.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    slow = model_table.bench([], SETTINGS, most_seconds=0.0, rows=rows[:1])
    assert not slow.measurements and "more than 0" in slow.unmeasured[0].reason


def test_torch_compile_has_columns_of_its_own(monkeypatch: MonkeyPatch) -> None:
    def compile(network: torch.nn.Module, **_: object) -> torch.nn.Module:
        if not isinstance(network, timm.models.ResNet):
            raise RuntimeError("no")
        return network

    monkeypatch.setattr(torch, "compile", compile)
    settings = replace(SETTINGS, sizes=[32], compile=True)
    report = model.bench(["test_resnet", "dat_atto"], settings)
    rows = {m.name: m.extra for m in report.measurements}
    assert [rows[name].get(model.COMPILED, 0) > 0 for name in ("resnet10t", "test_resnet", "dat_atto")] == [
        True,
        True,
        False,
    ]
    assert (
        "(" in str(rows["test_resnet"][model.COMPILED_RATIO])
        and rows["resnet10t"][model.COMPILED_RATIO] is None
    )
    assert report.notes == ["dat_atto: torch.compile failed: RuntimeError: no"]
    table = model_table.bench([], settings, most_seconds=60.0, rows=[Row("test_resnet", 64)])
    assert all(m.extra[model.COMPILED] for m in table.measurements)
    assert model.COMPILED not in model.bench(["test_resnet"], replace(settings, compile=False)).as_markdown()


def test_what_a_turn_needs_is_known_before(monkeypatch: MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    weights = sum(p.nbytes for p in model.build("resnet10t", 64, 0.0, cpu).parameters())
    inference, training = (model_table.needed("resnet10t", 64, 4, train) for train in (False, True))
    assert weights < inference < training and training > 2 * weights
    # What grows with the images grows in proportion.
    more = model_table.needed("resnet10t", 64, 8, True) - training
    assert more == approx(2 * (training - model_table.needed("resnet10t", 64, 2, True)), rel=0.1)
    monkeypatch.setattr(host_memory, "available", lambda: training)
    told = model_table.too_large(Row("resnet10t", 64), batch=4, train=True, device=cpu)
    assert told is not None and told.startswith("it needs")
    assert model_table.too_large(Row("resnet10t", 64), batch=4, train=False, device=cpu) is None
