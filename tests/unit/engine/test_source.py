"""A fine-tune without weights to start from is refused, by whatever would train it; a random network is never trained in silence."""

import os

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from dattrain.cli import main as cli
from dattrain.cli import plan as verb
from dattrain.config.derive import check_source, derive
from dattrain.config.load import loads
from dattrain.engine.session import open_session
from dattrain.engine.train import train
from dattrain.errors import ConfigError, UserError
from dattrain.planning import plan

BASE = """name: tune
model: {name: dat_atto, img_size: 32}
data: {train: "https://host/a.tar", cache_dir: cache}
train: {global_batch: 8, micro_batch: 8}
"""
REFUSED = r"tune is a fine-tune \({}\).*init.from=RUN_OR_WEIGHTS, for example init.from="


@pytest.mark.parametrize(
    "mark", ["init.required=true", "init.head=map", "init.head=new", "optim.freeze_backbone=true"]
)
def test_what_makes_a_fine_tune(mark):
    check_source(loads(BASE).config)
    for source in ("init.from=null", "init.from="):
        with pytest.raises(ConfigError, match=REFUSED.format(mark)):
            check_source(loads(BASE, [mark, source]).config)
    check_source(loads(BASE, [mark, "init.from=runs/a"]).config, waits=True)


def test_what_it_starts_from_is_there(tmp_path, capsys, monkeypatch):
    """Whoever plans, queues or trains says so at once; where another job comes first, it may write it."""
    monkeypatch.setattr(plan, "plan", lambda *a, **k: {"problems": []})
    monkeypatch.setattr(verb, "render", lambda *a: "planned")
    recipe, weights, profile = (tmp_path / name for name in ("tune.yaml", "w.safetensors", "profile.yaml"))
    recipe.write_text(BASE)
    profile.write_text("tasks_per_node: 1\n")
    submit = ["submit", "--cluster", str(profile), "--dry-run", "--run", str(tmp_path / "run"), str(recipe)]
    for source, told in (
        (weights, "w.safetensors: no such run folder, checkpoint or file"),
        (weights / "below", "no such run folder"),
        ("s3://bucket/w.safetensors", "no such run folder"),
        (recipe, "tune.yaml is not a safetensors file; `dattrain import` reads"),
    ):
        for words in (["plan", str(recipe)], submit):
            assert cli.main([*words, f"init.from={source}"]) == 1
            assert told in capsys.readouterr().err
    assert cli.main([*submit, f"init.from={weights}", "--after", "7"]) == 0
    save_file({"a": torch.zeros(1)}, weights)
    for there in (weights, tmp_path):
        assert cli.main(["plan", str(recipe), f"init.from={there}"]) == 0


def test_a_folder_that_holds_no_weights_is_named_with_its_setting(tmp_path):
    config = loads(BASE, [f"init.from={tmp_path}"]).config
    derived = derive(config, world=1, samples_per_epoch=8)
    with pytest.raises(UserError, match=f"^init.from={tmp_path}: .* holds no checkpoint"):
        open_session(config, derived, torch.device("cpu"), 32)


def test_training_is_refused_before_anything_is_read_or_written(tmp_path):
    config = loads(BASE, ["init.required=true", f"data.train={tmp_path}/nowhere"]).config
    with pytest.raises(ConfigError, match=REFUSED.format("init.required=true")):
        train(config, tmp_path / "run")
    assert not dist.is_initialized() and "RANK" not in os.environ
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_plan_and_submit_refuse_it_but_for_a_run_under_way(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, "plan", lambda *a, **k: {"problems": []})
    monkeypatch.setattr(verb, "render", lambda *a: "planned")
    recipe, run = tmp_path / "tune.yaml", tmp_path / "run"
    recipe.write_text(BASE + "init: {required: true}\n")
    submit = ["submit", "--cluster", "local", "--dry-run", "--run", str(run)]
    for words in (["plan", str(recipe)], [*submit, str(recipe)]):
        assert cli.main(words) == 2
        assert "init.from=RUN_OR_WEIGHTS" in capsys.readouterr().err
        assert cli.main([*words, f"init.from={tmp_path}"]) == 0
    checkpoint = run / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    (run / "config.yaml").write_text(recipe.read_text())
    assert cli.main(["plan", str(run)]) == 0
    assert cli.main(["submit", str(run), "--cluster", "local", "--dry-run"]) == 0


def test_a_chain_fills_it_in(tmp_path, capsys):
    (tmp_path / "tune.yaml").write_text(BASE + "init: {required: true}\n")
    (tmp_path / "first.yaml").write_text(BASE)
    chain, profile = tmp_path / "chain.yaml", tmp_path / "profile.yaml"
    profile.write_text("tasks_per_node: 1\n")
    words = ["submit", str(chain), "--cluster", str(profile), "--dry-run", "--run", str(tmp_path / "runs")]
    chain.write_text(
        "name: c\nstages: {first: {config: first.yaml}, tune: {config: tune.yaml, from: first}}\n"
    )
    assert cli.main(words) == 0, capsys.readouterr().err
    chain.write_text("name: c\nstages: {first: {config: first.yaml}, tune: {config: tune.yaml}}\n")
    assert cli.main(words) == 2 and "init.from=RUN_OR_WEIGHTS" in capsys.readouterr().err
