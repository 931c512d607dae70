"""What is refused before any state is touched, and what a manifest says of its run."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from types import SimpleNamespace

import pytest
from state_fakes import make

from dattrain.config.schema import Config
from dattrain.config.sections import Checkpoint, Model, Train
from dattrain.errors import UserError
from dattrain.runtime import claims, owner
from dattrain.state import partition
from dattrain.state.checkpointer import Checkpointer, describe
from dattrain.state.format import checkpoint, rank_file, retention
from dattrain.state.format.manifest import Manifest, Parameter
from dattrain.state.format.rank_file import Piece
from dattrain.state.format.retention import Policy
from dattrain.state.writer import Staged


@pytest.mark.parametrize(
    "version, good",
    [("0.19.8", True), ("0.20.0+abc", True), ("1.0.0", True), ("0.19.7", False), ("0.9.12", False)],
)
def test_deepspeed_must_be_new_enough(monkeypatch, version, good):
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(__version__=version))
    if good:
        partition._require_version()
    else:
        with pytest.raises(UserError, match=f"deepspeed {version} is installed.*0.19.8"):
            partition._require_version()


@pytest.mark.parametrize("where", ["swap_optimizer", "params_in_nvme_and_cpu"])
def test_state_in_swap_files_is_refused(where):
    with pytest.raises(UserError, match="nvme cannot be checkpointed.*device: cpu"):
        partition._refuse_nvme(SimpleNamespace(**{where: True}))
    partition._refuse_nvme(SimpleNamespace(**{where: False}))


def test_the_recipe_sets_policy_and_description(tmp_path):
    config = Config(
        checkpoint=Checkpoint(keep_last=3, keep_best=2, metric="loss", background=False, verify=False)
    )
    keeper = Checkpointer.from_config(tmp_path, config)
    assert (keeper.policy.keep_last, keeper.policy.keep_best, keeper.policy.metric) == (3, 2, "loss")
    assert not keeper.background and not keeper.verify
    one, same = describe(config), describe(Config(**config.model_dump()))
    other = describe(Config(model=Model(num_classes=7), train=Train(precision="fp32")))
    assert one.config_sha256 == same.config_sha256 != other.config_sha256 and len(one.config_sha256) == 64
    assert other.precision == "fp32" and {"python", "torch", "deepspeed"} <= one.versions.keys()


def test_a_new_checkpointer_clears_what_a_killed_one_left(tmp_path):
    (tmp_path / "checkpoints" / ".new-abc-1-step_00000003").mkdir(parents=True)
    Checkpointer(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []


class _Copied:
    def run(self):
        pass


def _save(keeper, step):
    """What the thread of a save does, of a state of one tensor."""
    layout = rank_file.layout([Piece("param", "w", 0, 4)])
    image = memoryview(bytearray(layout.size))
    image[: len(layout.header)] = layout.header
    manifest = Manifest(step, step, 1, 0, "fp32", ("param",), {"w": Parameter((4,))})
    keeper._write(
        checkpoint.temporary_folder(keeper.root, step, f"{keeper._token}-{step}"),
        manifest,
        Staged(layout, image, _Copied()),
    )


def test_once_another_has_the_run_folder_nothing_is_published_or_removed(tmp_path):
    with owner.acquire(tmp_path, heartbeat_s=60) as mine:
        keeper = Checkpointer(tmp_path, Policy(1), owner=mine)
        _save(keeper, 1)
        assert not keeper.failed
        # As it is when another has waited for this process in vain; it would not have kept the first of the two.
        seen = claims.claim_chain(mine.path)
        successor = dataclasses.replace(claims.own_record(tmp_path), pid=7, host="other")
        assert claims.take_over(mine.path, seen, successor)
        _save(Checkpointer(tmp_path, Policy(2), owner=None), 2)
        with pytest.raises(UserError, match="step 3 could not be written.*process 7 on other.*has taken"):
            _save(keeper, 3)
        assert sorted(p.name for p in keeper.root.iterdir()) == ["step_00000001", "step_00000002"]
        assert keeper.failed
        with pytest.raises(owner.InUse, match="process 7 on other.*has taken this run folder over"):
            keeper.wait()


def test_what_a_living_one_writes_is_not_cleared(tmp_path):
    writes = tmp_path / "checkpoints" / ".new-abc-1-step_00000003"
    writes.mkdir(parents=True)
    with owner.acquire(tmp_path) as mine:
        Checkpointer(tmp_path)
        assert writes.exists()
        Checkpointer(tmp_path, owner=mine)
        assert not writes.exists()


def test_a_recovery_takes_the_name_before_the_files(tmp_path, monkeypatch):
    """So a save that goes on after its process was taken for dead publishes all of it, or nothing."""
    folder = checkpoint.temporary_folder(tmp_path, 3, "abc")
    folder.mkdir()
    deleted = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: path.exists() and deleted.append(path.name))
    assert checkpoint.recover(tmp_path) == [folder.name]
    assert deleted == [f".gone-{folder.name}"]


def test_a_checkpoint_that_was_removed_by_hand_does_not_end_the_run(tmp_path, monkeypatch):
    make(tmp_path, 1)
    make(tmp_path, 2)
    entries = checkpoint.list_all(tmp_path)
    shutil.rmtree(tmp_path / "step_00000001")
    monkeypatch.setattr(checkpoint, "list_all", lambda root: entries)
    assert retention.prune(tmp_path, Policy(1)) == []
