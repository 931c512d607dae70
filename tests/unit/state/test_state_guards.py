"""What is refused before any state is touched, and what a manifest says of its run."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from dattrain.config.schema import Checkpoint, Config, Model, Train
from dattrain.errors import UserError
from dattrain.state import fragments
from dattrain.state.checkpointer import Checkpointer, describe


@pytest.mark.parametrize(
    "version, good",
    [("0.19.8", True), ("0.20.0+abc", True), ("1.0.0", True), ("0.19.7", False), ("0.9.12", False)],
)
def test_deepspeed_must_be_new_enough(monkeypatch, version, good):
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(__version__=version))
    if good:
        fragments._require_version()
    else:
        with pytest.raises(UserError, match=f"deepspeed {version} is installed.*0.19.8"):
            fragments._require_version()


@pytest.mark.parametrize("where", ["swap_optimizer", "params_in_nvme_and_cpu"])
def test_state_in_swap_files_is_refused(where):
    with pytest.raises(UserError, match="nvme cannot be checkpointed.*device: cpu"):
        fragments._refuse_nvme(SimpleNamespace(**{where: True}))
    fragments._refuse_nvme(SimpleNamespace(**{where: False}))


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
