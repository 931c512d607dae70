"""A checkpoint loads into any world size and ZeRO stage with every weight, moment and average equal to the bit."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from state_ranks import assert_same, run, states
from state_worker import Job

from dattrain.state.format import checkpoint
from dattrain.state.format.manifest import read_manifest

CHAIN = [(1, 1), (4, 3), (2, 2), (3, 0), (1, 3)]
"""(world, stage), one after another: ranks 1 -> 4 -> 2 -> 3 -> 1, stages 1 -> 3 -> 2 -> 0 -> 3."""

LOSS_BOUND = 2e-6
"""Of the fp32 loss, relative, between a run that changed ranks and stages and one that did not: summation order alone."""


ACCUMULATION = {1: 2, 2: 3, 3: 2, 4: 3}
"""By world size; the global batch is 12."""


def chain(tmp: Path, **fields: object) -> None:
    """Two updates at every station of CHAIN; each station also saves at once what it loaded, and losses follow one run's."""
    job = Job("", "", ema=0.9, **fields)  # type: ignore[arg-type]
    steps = 2 * len(CHAIN)
    (undisturbed,) = run(
        1, [dataclasses.replace(job, run=str(tmp / "one"), out=str(tmp / "o"), stage=1, until=steps)], tmp
    )
    elastic, losses = tmp / "elastic", []
    for i, (world, stage) in enumerate(CHAIN):
        step, reload = 2 * i, tmp / f"reload-{i}"
        here = dataclasses.replace(job, stage=stage, resume=True, accumulation=ACCUMULATION[world])
        jobs = [dataclasses.replace(here, run=str(elastic), out=str(tmp / "trained"), until=step + 2)]
        if i:
            folder = checkpoint.folder_name(step)
            shutil.copytree(elastic / "checkpoints" / folder, reload / "checkpoints" / folder)
            jobs.insert(0, dataclasses.replace(here, run=str(reload), out=str(tmp / "reloaded"), until=step))
        results = run(world, jobs, tmp)
        assert [r["resumed_at"] for r in results] == [step] * len(jobs)
        if i:
            # Loaded here and saved here, it is the same checkpoint in other pieces.
            assert read_manifest(reload / "checkpoints" / folder).world == world
            assert_same(states(elastic, step), states(reload, step))
        assert [g["lr"] for g in results[-1]["groups"]] == [3e-3, 1e-3]
        assert [g["weight_decay"] for g in results[-1]["groups"]] == [0.05, 0.0]
        losses += results[-1]["losses"]
        manifest = read_manifest(elastic / "checkpoints" / checkpoint.folder_name(step + 2))
        assert {p.opt_step for p in manifest.parameters.values()} == {step + 2}, "Adam's step is counted once"
        assert manifest.engine["global_steps"] == step + 2
    worst = max(abs(a - b) / a for a, b in zip(undisturbed["losses"], losses))
    print(f"largest relative difference of a loss: {worst:.2e}")
    bound = LOSS_BOUND if job.precision == "fp32" else 5e-3
    assert len(losses) == steps and worst < bound, (worst, undisturbed["losses"], losses)


def test_ranks_and_stages_change_and_state_does_not(tmp_path):
    chain(tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("precision", ["bf16", "bf16-pure"])
def test_ranks_and_stages_change_in_half_precision(tmp_path, precision, monkeypatch):
    stations = [s if precision == "bf16" or s[1] else (s[0], 2) for s in CHAIN]
    monkeypatch.setattr("test_elastic.CHAIN", stations)
    chain(tmp_path, precision=precision)


@pytest.mark.full
@pytest.mark.parametrize("frozen", [False, True])
def test_from_every_world_and_stage_to_every_other(tmp_path, frozen):
    job = Job("", "", ema=0.9, frozen=frozen)
    places = [(w, s) for w in (1, 2, 3) for s in (0, 1, 2, 3)]
    for world in (1, 2, 3):
        run(
            world,
            [
                dataclasses.replace(
                    job, run=str(tmp_path / f"{world}-{s}"), out=str(tmp_path / "o"), stage=s, until=2
                )
                for s in (0, 1, 2, 3)
            ],
            tmp_path,
        )
    folder = checkpoint.folder_name(2)
    for world in (1, 2, 3):
        jobs = []
        for w, s in places:
            for stage in (0, 1, 2, 3):
                target = tmp_path / f"{w}-{s}-to-{world}-{stage}"
                shutil.copytree(
                    tmp_path / f"{w}-{s}" / "checkpoints" / folder, target / "checkpoints" / folder
                )
                jobs.append(
                    dataclasses.replace(
                        job, run=str(target), out=str(tmp_path / "o"), stage=stage, until=2, resume=True
                    )
                )
        run(world, jobs, tmp_path)
        for w, s in places:
            expected = states(tmp_path / f"{w}-{s}", 2)
            for stage in (0, 1, 2, 3):
                assert_same(expected, states(tmp_path / f"{w}-{s}-to-{world}-{stage}", 2))
