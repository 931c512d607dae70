"""N steps in one go equal k steps, another process, and N - k steps: losses, weights, moments, averages, to the bit."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from pathlib import Path

import pytest
from state_ranks import assert_same, run, states
from state_worker import Job

MODES = [
    (stage, precision)
    for stage in (0, 1, 2, 3)
    for precision in ("fp32", "bf16", "bf16-pure", "fp16")
    if stage or precision in ("fp32", "bf16")
]
"""What the configuration accepts: DeepSpeed trains wrongly in bf16-pure and fp16 at stage 0."""


def check(world: int, jobs: dict[str, Job], tmp: Path, *, until: int = 5, at: int = 2) -> None:
    """Every job once in one go and once interrupted at ``at``."""
    whole = [
        dataclasses.replace(
            j, run=str(tmp / n / "whole"), out=str(tmp / f"{n}-whole.json"), until=until, save_at=[at]
        )
        for n, j in jobs.items()
    ]
    once = run(world, whole, tmp)
    for name in jobs:
        source = tmp / name / "whole" / "checkpoints" / f"step_{at:08d}"
        shutil.copytree(source, tmp / name / "again" / "checkpoints" / source.name)
    rest = [
        dataclasses.replace(
            j, run=str(tmp / n / "again"), out=str(tmp / f"{n}-again.json"), until=until, resume=True
        )
        for n, j in jobs.items()
    ]
    for name, one, two in zip(jobs, once, run(world, rest, tmp)):
        assert two["resumed_at"] == at, name
        assert repr(two["losses"]) == repr(one["losses"][at:]), name  # one of them may be nan
        assert len({repr(x) for x in one["losses"]}) == until, (
            f"{name}: a loss that does not move proves nothing"
        )
        assert two["scalars"] == one["scalars"], name
        assert one["scalars"]["skipped_steps"] == (jobs[name].nan_at >= 0), name
        assert_same(states(tmp / name / "whole", until), states(tmp / name / "again", until))


def test_stages_by_precisions(tmp_path):
    """Every stage and precision; accumulation, activation checkpointing and EMA spread over them."""
    jobs = {
        f"{stage}-{precision}": Job(
            "",
            "",
            stage,
            precision,
            accumulation=1 + i % 2,
            remat=i % 3 == 0,
            ema=0.9 if i % 4 else 0.0,
            background=i % 5 > 0,
        )
        for i, (stage, precision) in enumerate(MODES)
    }
    check(2, jobs, tmp_path)


def test_frozen_offloaded_channels_last_and_skipped(tmp_path):
    """A linear probe, the optimizer on the CPU, other memory formats, small sub-groups, and a step that is skipped."""
    offload = {"offload_optimizer": {"device": "cpu"}}
    jobs = {
        "frozen-0": Job("", "", 0, frozen=True, ema=0.9),
        "frozen-2": Job("", "", 2, "bf16-pure", frozen=True),
        "frozen-3": Job("", "", 3, frozen=True, ema=0.9),
        "offload-2": Job("", "", 2, zero=offload, accumulation=2),
        "offload-3": Job("", "", 3, zero={**offload, "offload_param": {"device": "cpu"}}),
        "channels-last-0": Job("", "", 0, channels_last=True, ema=0.9),
        "sub-groups": Job("", "", 3, zero={"sub_group_size": 100}),
        "round-robin": Job("", "", 2, zero={"round_robin_gradients": True}),
        "skipped-fp16": Job("", "", 2, "fp16", nan_at=1, ema=0.9),
        "skipped-fp32": Job("", "", 3, nan_at=3),
    }
    check(2, jobs, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_whole_matrix(tmp_path, world):
    """Stage x precision x activation checkpointing x accumulation x EMA."""
    jobs = {
        f"{stage}-{precision}-{remat}-{accumulation}-{ema}": Job(
            "", "", stage, precision, accumulation=accumulation, remat=remat, ema=ema
        )
        for (stage, precision), remat, accumulation, ema in itertools.product(
            MODES, (False, True), (1, 3), (0.0, 0.9)
        )
    }
    check(world, jobs, tmp_path, until=4)
