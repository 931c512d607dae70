"""The alternating timer and its report, on clocks that the test winds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from dattrain.bench import common
from dattrain.cli import bench, bench_output
from dattrain.errors import UserError


class Clock:
    """Seconds that pass when a contender says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float):
        def function() -> None:
            self.now += seconds

        return function


def test_ratios_are_of_turns_beside_each_other_and_above_one_is_faster() -> None:
    clock = Clock()
    slow, fast = common.compare(
        "case",
        {"slow": clock.work(0.3), "fast": clock.work(0.1)},
        baseline="slow",
        rounds=5,
        items=6,
        clock=clock,
        cpu_clock=clock,
    )
    assert fast.ratio == pytest.approx((3, 3, 3)) and slow.ratio == pytest.approx((1, 1, 1))
    assert fast.throughput == pytest.approx(60) and fast.cpu.median == pytest.approx(0.1)
    with pytest.raises(UserError, match="'other' is not among the contenders: slow"):
        common.compare("case", {"slow": clock.work(1)}, baseline="other")


def test_each_round_begins_with_the_next_contender_and_short_ones_repeat() -> None:
    clock, calls = Clock(), []

    def contender(name: str, seconds: float):
        def function() -> None:
            calls.append(name)
            clock.now += seconds

        return function

    common.compare(
        "case", {"a": contender("a", 0.5), "b": contender("b", 0.25), "c": contender("c", 1)}, baseline="a", rounds=4,
        warmup=1, min_seconds=0.5, clock=clock, cpu_clock=clock,
    )  # fmt: skip
    assert "".join(calls) == "abc" + "abbc" + "bbca" + "cabb" + "abbc"


def test_the_report_is_written_in_every_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    measured = common.compare(
        "a case", {"x": clock.work(0.2), "y": clock.work(0.1)}, baseline="x", rounds=3, items=2,
        extra={"y": {"MB kept": 1.5}}, clock=clock, cpu_clock=clock,
    )  # fmt: skip
    parser = argparse.ArgumentParser()
    bench_output.add_output_arguments(parser)
    paths = {kind: tmp_path / "new" / f"r.{kind}" for kind in ("json", "md", "png")}
    args = parser.parse_args(
        ["--json", str(paths["json"]), "--markdown", str(paths["md"]), "--picture", str(paths["png"])]
    )
    bench_output.emit(
        common.BenchReport("Title", measured, item="image", notes=["a note"], command="dattrain bench x"),
        args,
    )
    assert "2.00x" in capsys.readouterr().out
    written = json.loads(paths["json"].read_text())
    assert written["command"] == "dattrain bench x" and written["measurements"][1]["ratio"][
        0
    ] == pytest.approx(2)
    page = paths["md"].read_text()
    assert (
        "dattrain bench x" in page
        and "| y | 2.00x (2.00-2.00) |" in page
        and "1.5" in page
        and "a note" in page
    )
    assert paths["png"].read_bytes().startswith(b"\x89PNG")
    bad = parser.parse_args(["--picture", str(tmp_path / "r.nonsense")])
    with pytest.raises(UserError, match="cannot write"):
        bench_output.emit(common.BenchReport("Title", measured), bad)


def test_a_subverbs_module_is_loaded_when_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.SUBVERBS, "broken", ("no.such.module", "is not there"))
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    assert parser.parse_args(["attention", "--sizes", "7"]).sizes == [7]
    with pytest.raises(ModuleNotFoundError):
        parser.parse_args(["broken"])


def test_bench_attention_runs_every_backend_against_the_straightforward_formulation(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    out = tmp_path / "a.json"
    args = parser.parse_args(
        ["attention", "--sizes", "4", "--batch", "1", "--heads", "2", "--groups", "1", "--dim", "4", "--rounds", "1",
         "--dtypes", "fp32", "--grids", "corner", "--passes", "both", "--backends", "torch", "--json", str(out)]
    )  # fmt: skip
    assert bench.run(args) == 0
    rows = json.loads(out.read_text())["measurements"]
    assert [row["name"] for row in rows] == ["straightforward", "torch"]
    kept = [row["extra"]["MB kept/image"] for row in rows]
    assert 0 < kept[1] < kept[0]


def test_the_straightforward_formulation_is_the_same_attention() -> None:
    import torch

    from dattrain import ops
    from dattrain.bench.attention import draw, straightforward

    plain = straightforward()
    assert plain is not None
    inputs = draw(5, 2, 4, 2, 8, torch.float32, torch.device("cpu"))
    for grid in ("center", "corner"):
        same = {"height": 5, "width": 5, "query_grid": grid}
        expected = ops.deform_attention(*inputs, **same, backend="reference")
        torch.testing.assert_close(plain.deform_attention(*inputs, **same), expected)


def test_the_core_is_timed_on_tokens_as_the_model_lays_them() -> None:
    import torch

    from dattrain.bench.attention import draw

    q, k, v, positions, table = draw(6, 2, 4, 2, 8, torch.bfloat16, torch.device("cpu"), keys=3)
    assert q.shape == (2, 4, 36, 8) and q.transpose(1, 2).is_contiguous()
    assert k.shape == v.shape == (2, 4, 9, 8) and k.stride() == v.stride() == (9 * 64, 8, 64, 1)
    assert v.data_ptr() - k.data_ptr() == 32 * k.element_size()
    assert positions.shape == (2, 2, 9, 2) and table.shape == (4, 11, 11)
    assert all(x.is_leaf and x.requires_grad for x in (q, k, v, positions, table))


def test_measuring_ceilings_draws_nothing_from_the_runs_generator() -> None:
    import torch

    from dattrain.observe import roofline

    torch.manual_seed(3)
    state = torch.get_rng_state()
    found = roofline.measure(torch.device("cpu"), torch.float32)
    assert found.flops > 0 and found.bytes > 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.gpu
def test_the_devices_clock_counts_a_replayed_call_and_nothing_else() -> None:
    import time

    import torch

    from dattrain.bench.device import DeviceClock

    device = torch.device("cuda")
    clock, notes, a = DeviceClock(device), [], torch.randn(2048, 2048, device=device)
    out = torch.zeros_like(a)
    call = clock.timed(lambda: out.copy_(a @ a), "product", notes)
    before = clock()
    time.sleep(0.2)
    assert clock() == before and not notes
    out.zero_()
    call()
    assert 0 < clock() - before < 0.1
    torch.testing.assert_close(out, a @ a)
    odd = clock.timed(lambda: float(out.sum()), "a host wait", notes)  # cannot be captured
    odd()
    assert len(notes) == 1 and notes[0].startswith("a host wait: timed without a CUDA graph")


def test_a_cuda_device_has_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from dattrain.bench.attention import pick_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    # torch.cuda.set_device, by which a process joins its group, takes none without.
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda", 1)
    assert pick_device("cuda:3") == torch.device("cuda", 3) and pick_device("cpu") == torch.device("cpu")
