"""Checkpoints by name, and the evaluation that is noted beside the manifest after the save."""

import logging
import threading

import pytest
from state_fakes import make

from dattrain.config.load import dump
from dattrain.config.schema import Config
from dattrain.config.sections import Checkpoint
from dattrain.errors import UserError
from dattrain.state import checkpointer
from dattrain.state.format import checkpoint, named, retention
from dattrain.state.format.retention import Policy


@pytest.fixture
def run(tmp_path):
    """Steps 1 to 4: of the third a file is short, the others were evaluated after they were saved."""
    run = tmp_path / "run"
    for step, loss in ((1, 3.0), (2, 1.0), (3, 0.5), (4, 2.0)):
        folder = make(run / "checkpoints", step, meta={"step": step, "samples_seen": step, "metrics": {}})
        checkpoint.write_metrics(folder, {"loss": loss, "top1": float("nan")})
    path = run / "checkpoints" / "step_00000003" / "rank_00001.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    (run / "config.yaml").write_text(dump(Config(checkpoint=Checkpoint(metric="loss"))))
    return run


def test_names_mean_complete_checkpoints_and_the_best_is_by_the_recipes_metric(run):
    def step(word):
        return int(named.find(word).name.removeprefix("step_"))

    assert [step(f"{run}{at}") for at in ("", "@last", "@best", "@1", "@step_00000002")] == [4, 4, 2, 1, 2]
    assert step(run / "checkpoints") == 4 and step(run / "checkpoints" / "step_00000001") == 1
    for word, message in (
        (f"{run}@3", "no complete checkpoint of step 3; there are those of steps 1, 2, 4"),
        (f"{run}@bset", "behind the @ stands best, last or a step"),
        (f"{run}x@best", "there is no run folder"),
    ):
        with pytest.raises(UserError, match=message):
            named.find(word)
    (run / "config.yaml").write_text(dump(Config()))
    with pytest.raises(UserError, match=r"no checkpoint was evaluated by top1 .*@last or .*@STEP"):
        named.find(f"{run}@best")


def test_a_better_one_is_named_only_where_the_choice_was_left_open(run, caplog):
    with caplog.at_level(logging.WARNING):
        for word in (f"{run}@best", f"{run}@4", f"{run}@last", run / "checkpoints" / "step_00000004"):
            named.find(word, hint=True)
        assert not caplog.messages
        named.find(run, hint=True)
    (said,) = caplog.messages
    assert said.endswith(f"step 4, its last, has loss 2; step 2 has 1: {run}@best"), said


def test_retention_keeps_the_best_by_what_was_noted_later(run):
    assert retention.prune(run / "checkpoints", Policy(1, keep_best=1, metric="loss")) == ["step_00000001"]
    checkpoint.write_metrics(run / "checkpoints" / "step_00000004", {"loss": 0.9})
    assert retention.prune(run / "checkpoints", Policy(1, keep_best=1, metric="loss")) == ["step_00000002"]


def test_an_evaluation_that_ends_before_its_save_is_noted_by_the_save(run, monkeypatch):
    """And one that ends after it at once."""
    one = checkpointer.Checkpointer(run, Policy(9))
    go, folder = threading.Event(), run / "checkpoints" / "step_00000005"

    def write(*_):
        go.wait()
        return make(run / "checkpoints", 5)

    monkeypatch.setattr(one._writer, "write", write)
    one._writing = 5
    one._task.start(lambda: one._write(folder, None, None))
    one.record(5, {"loss": 0.25})
    assert not folder.exists()
    go.set()
    one.wait()
    assert checkpoint.read_metrics(folder) == {"loss": 0.25}
    one.record(5, {"loss": 0.125})
    assert checkpoint.read_metrics(folder) == {"loss": 0.125}
    one.record(6, {"loss": 1.0})  # a step that was not saved
    assert not (run / "checkpoints" / "step_00000006").exists()
