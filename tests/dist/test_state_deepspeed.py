"""From DeepSpeed's checkpoints to ours and back: equal to the bit with what our own save of the same engine holds."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from state_ranks import HERE, assert_same, finished, spawn, states
from state_worker import Job

from dattrain.errors import UserError
from dattrain.state.convert import deepspeed_read, deepspeed_write, offline
from dattrain.state.format import checkpoint
from dattrain.state.format.manifest import Manifest, read_manifest
from dattrain.state.convert.deepspeed_read import name_states

MODES = {
    "0-fp32": Job("", "", 0),
    "1-fp32": Job("", "", 1),
    "1-bf16-pure": Job("", "", 1, "bf16-pure"),
    "2-bf16-frozen": Job("", "", 2, "bf16", frozen=True),
    "2-fp16": Job("", "", 2, "fp16"),
    "3-bf16": Job("", "", 3, "bf16", zero={"sub_group_size": 100}),
    "3-bf16-pure-frozen": Job("", "", 3, "bf16-pure", frozen=True),
}


def ranks(what: str, world: int, plan: list[tuple[Path, Job]], tmp: Path) -> None:
    path = tmp / f"{what}-{world}.json"
    path.write_text(json.dumps([(str(f), dataclasses.asdict(j)) for f, j in plan]))
    finished(spawn(world, [str(HERE / "state_deepspeed.py"), what, str(path)]))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every mode, trained and saved both ways on two ranks."""
    tmp = tmp_path_factory.mktemp("deepspeed")
    ranks(
        "save",
        2,
        [(tmp / n / "theirs", dataclasses.replace(j, run=str(tmp / n / "ours"))) for n, j in MODES.items()],
        tmp,
    )
    return tmp


def imported(source: deepspeed_read.Source, run_dir: Path) -> Path:
    manifest = Manifest(
        step=source.step,
        samples_seen=source.samples,
        world=0,
        stage=source.stage,
        precision="",
        states=("param", "exp_avg", "exp_avg_sq"),
        parameters=source.parameters,
        buffers=source.buffers,
        engine=source.engine,
        groups=source.groups,
    )
    return offline.write_checkpoint(run_dir / "checkpoints", manifest, source.parts)


@pytest.mark.parametrize("name", MODES)
def test_theirs_read_in_is_ours(saved, tmp_path, name):
    source = deepspeed_read.read(saved / name / "theirs")
    assert (source.step, source.samples, source.stage) == (2, 24, MODES[name].stage)
    folder = imported(source, tmp_path)
    ours = checkpoint.check(saved / name / "ours" / "checkpoints" / folder.name)
    got = checkpoint.check(folder)
    assert got.parameters == ours.parameters and list(got.parameters) == list(ours.parameters)
    assert got.engine == ours.engine and got.buffers == ours.buffers
    assert [(g["lr"], g["weight_decay"]) for g in got.groups] == [
        (g["lr"], g["weight_decay"]) for g in ours.groups
    ]
    theirs, held = states(tmp_path, 2), states(saved / name / "ours", 2)
    assert_same(held, theirs)


def test_ours_written_out_is_loaded_by_deepspeed(saved, tmp_path):
    """The universal layout, from a stage-3 and a stage-2 run of two ranks, into stages 1, 2, 3 on one rank and on two."""
    sources = ["1-fp32", "3-bf16"]
    for name in sources:
        deepspeed_write.write_universal(saved / name / "ours", tmp_path / name)
        with pytest.raises(UserError, match="is there already"):
            deepspeed_write.write_universal(saved / name / "ours", tmp_path / name)
    for world in (1, 2):
        plan = [
            (tmp_path / n, Job(str(tmp_path / f"{n}-{stage}-{world}"), "", stage))
            for n in sources
            for stage in (1, 2, 3)
        ]
        ranks("load", world, plan, tmp_path)
        for n in sources:
            expected = states(saved / n / "ours", 2)
            for stage in (1, 2, 3):
                got = states(tmp_path / f"{n}-{stage}-{world}", 2)
                # A universal load leaves buffers to the module.
                assert_same(
                    {k: v for k, v in expected.items() if "buffer" not in k},
                    {k: v for k, v in got.items() if "buffer" not in k},
                )
                manifest = read_manifest(
                    tmp_path / f"{n}-{stage}-{world}" / "checkpoints" / "step_00000002"
                )
                assert {p.opt_step for p in manifest.parameters.values()} == {2}
                assert manifest.engine["global_steps"] == 2


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return (os.mkdir, (str(self.canary),))


@pytest.mark.parametrize("name", ["0-fp32", "2-fp16", "3-bf16"])
def test_hostile_pickles_run_only_with_trust(saved, tmp_path, name):
    canary = tmp_path / "canary"
    theirs = tmp_path / "theirs"
    shutil.copytree(saved / name / "theirs", theirs)
    for path in sorted(theirs.rglob("*.pt")):
        whole = path.read_bytes()
        loaded = torch.load(path, weights_only=False)
        loaded["note"] = Bomb(canary)
        torch.save(loaded, path)
        with pytest.raises(UserError, match=f"{path.name}: cannot be read without running code.*--trust"):
            imported(deepspeed_read.read(theirs), tmp_path / "run")
        path.write_bytes(pickle.dumps(Bomb(canary)))
        with pytest.raises(UserError, match=path.name):
            imported(deepspeed_read.read(theirs), tmp_path / "run")
        path.write_bytes(whole)
    assert not canary.exists()
    (theirs / "latest").write_text("../../etc")
    with pytest.raises(UserError, match="has no tag"):
        deepspeed_read.read(theirs)
    path = next(iter(sorted(theirs.rglob("*model_states.pt"))))
    loaded = torch.load(path, weights_only=False)
    loaded["note"] = Bomb(canary)
    torch.save(loaded, path)
    deepspeed_read.read(path.parent, trust=True)
    assert canary.exists()


def test_what_is_missing_is_named(saved, tmp_path):
    with pytest.raises(UserError, match="neither a file 'latest' nor"):
        deepspeed_read.read(tmp_path)
    shutil.copytree(saved / "2-fp16" / "theirs", tmp_path / "theirs")
    lost = next((tmp_path / "theirs").rglob("zero_pp_rank_1*"))
    whole = lost.read_bytes()
    lost.unlink()
    with pytest.raises(UserError, match="saved by 2 ranks and holds the optimizer states of 1"):
        deepspeed_read.read(tmp_path / "theirs")
    lost.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{lost.name}: cannot be read"):
        imported(deepspeed_read.read(tmp_path / "theirs"), tmp_path / "run")
    assert not any(checkpoint.list_all(tmp_path / "run" / "checkpoints"))


def test_numbered_states_get_the_only_names_that_fit():
    shapes = {"a.w": (4, 3), "a.b": (4,), "b.w": (4, 3), "b.b": (4,)}
    assert name_states(shapes, [[(4, 3), (4, 3)], [(4,), (4,)]]) == [["a.w", "b.w"], ["a.b", "b.b"]]
    assert name_states(shapes, [[(4, 3), (4,), (4, 3), (4,)]]) == [["a.w", "a.b", "b.w", "b.b"]]
    assert name_states(shapes, [[(4,), None], [(4, 3), (4, 3)]]) == [["a.b", "b.b"], ["a.w", "b.w"]]
    with pytest.raises(UserError, match="several ways"):
        name_states(shapes, [[(4, 3), (4,)], [(4, 3), (4,)]])
    with pytest.raises(UserError, match="several ways"):
        name_states(shapes, [[(4, 3)]])
    with pytest.raises(UserError, match="do not fit"):
        name_states(shapes, [[(4, 3), (4, 3)], [(4,), (5,)]])
