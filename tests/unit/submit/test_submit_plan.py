"""From a command line to stages: run folders, arrays, continuing, what a dry run shows, and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dattrain.cli import plan as plan_verb
from dattrain.cli.main import main
from dattrain.config.load import loads
from dattrain.data.classes import Classes
from dattrain.data.source.index import CatalogueEntry, write_catalogue
from dattrain.engine import resume_rules
from dattrain.errors import ConfigError, UserError
from dattrain.state.format.manifest import Manifest
from dattrain.state.format.rank_file import Digest
from dattrain.submit import checks, plan, run_folders, submission
from dattrain.submit.plan import SubmitRequest


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a recipe and a profile; no Slurm command is there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nonexistent")
    (tmp_path / "r.yaml").write_text(
        "name: demo\ntrain: {global_batch: 64, micro_batch: 8}\ndata: {train: shards}\n"
    )
    (tmp_path / "box.yaml").write_text("container: {runtime: pyxis, image: x}\nsignal_delay_s: 60\n")
    (tmp_path / "c.yaml").write_text("tasks_per_node: 2\npython: /env/python\nsignal_delay_s: 60\n")
    return tmp_path


ASKED = SubmitRequest("r.yaml", cluster="./c.yaml")


def test_a_recipe_becomes_one_run_named_after_it(home: Path) -> None:
    (stage,) = plan.plan(ASKED).stages
    assert stage.runs == (home / "runs" / "demo",)
    assert stage.minutes == 1440
    assert stage.placement().folder == home / "runs" / "demo" / "submit" / "slurm"


def test_an_array_is_a_run_for_each_value_with_commas_kept_in_brackets(home: Path) -> None:
    (stage,) = plan.plan(replace(ASKED, array=("optim.betas=[0.9,0.99],[0.9,0.999]",))).stages
    assert [run.name for run in stage.runs] == ["optim.betas=_0.9_0.99_", "optim.betas=_0.9_0.999_"]
    assert [loaded.config.optim.betas for loaded in stage.loaded] == [(0.9, 0.99), (0.9, 0.999)]
    assert stage.placement().folder == home / "runs" / "demo" / "submit" / "slurm"
    for text, words in (
        ("optim.lr", "write key=v1,v2"),
        ("optim.lr=", "write key=v1,v2"),
        ("optim.lr=1e-3,1e-3", "there twice"),
        ("optim.lrr=1", "did you mean"),
    ):
        with pytest.raises(ConfigError, match=words):
            plan.plan(replace(ASKED, array=(text,)))


def test_an_array_of_several_keys_is_their_product_named_by_what_differs(home: Path) -> None:
    words = ("optim.lr=1e-3,5e-4", "train.seed=0,1", "schedule.epochs=30")
    (stage,) = plan.plan(replace(ASKED, array=words)).stages
    assert [run.name for run in stage.runs] == [
        "optim.lr=1e-3,train.seed=0", "optim.lr=1e-3,train.seed=1", "optim.lr=5e-4,train.seed=0", "optim.lr=5e-4,train.seed=1"
    ]  # fmt: skip
    assert [(c.config.optim.lr, c.config.train.seed, c.config.schedule.epochs) for c in stage.loaded] == [
        (1e-3, 0, 30), (1e-3, 1, 30), (5e-4, 0, 30), (5e-4, 1, 30)
    ]  # fmt: skip
    (stage,) = plan.plan(replace(ASKED, array=("train.seed=3",))).stages
    assert [run.name for run in stage.runs] == ["train.seed=3"]
    for refused, why in (
        (("optim.lr=1e-3", "optim.lr=2e-3"), "optim.lr is there twice"),
        (("train.seed=0,1", "optim.lrr=1,2"), "did you mean"),
        (
            ("data.train=a/b,a:b",),
            "data.train=a/b and data.train=a:b would both be trained in a folder data.train=a_b",
        ),
    ):
        with pytest.raises(ConfigError, match=why):
            plan.plan(replace(ASKED, array=refused))


def test_the_verb_takes_the_words_behind_array(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "submit",
        "r.yaml",
        "optim.clip=1",
        "--array",
        "optim.lr=1e-3,5e-4",
        "train.seed=0,1",
        "--cluster",
        "local",
        "--dry-run",
    ]
    assert (
        main(words) == 1 and "data.train=shards: there is no such file or folder" in capsys.readouterr().err
    )
    (home / "shards").mkdir()
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert shown.count("run folder") == 4
    assert "one after the other (this is 1 to 4 of 4)" in shown


def test_a_dry_run_prints_plan_and_script_and_writes_nothing(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(home.rglob("*"))
    assert submission.submit(replace(ASKED, nodes="2", dry_run=True)) == 0
    shown = capsys.readouterr().out
    assert "64 = 4 device(s) x 8 x 2 accumulated" in shown
    assert "#SBATCH --nodes=2" in shown
    assert sorted(home.rglob("*")) == before


def test_a_dry_run_on_this_machine_speaks_of_no_cluster(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "shards").mkdir()
    submission.submit(replace(ASKED, cluster="local", dry_run=True))
    shown = capsys.readouterr().out
    assert "demo: 1 node(s) x 1 task(s), profile local\n" in shown
    assert "on this machine; a supervisor in the background starts it again; 3 crash(es) forgiven" in shown
    assert "requeue" not in shown and " min " not in shown
    submission.submit(replace(ASKED, cluster="local", time="0:30:00", dry_run=True))
    assert "30 min an attempt, profile local\n" in capsys.readouterr().out


def test_a_chain_shows_who_waits_for_whom(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "chain.yaml").write_text(
        "name: two\nstages:\n  a: {config: r.yaml, nodes: 2}\n  b: {config: r.yaml, from: a}\n  c: {evaluate: b}\n"
    )
    made = plan.plan(replace(ASKED, config="chain.yaml"))
    assert made.needs == (None, 0, 1)
    assert [stage.action for stage in made.stages] == ["train", "train", "evaluate"]
    assert [stage.nodes for stage in made.stages] == [(2, 2), (1, 1), (1, 1)]
    submission.submit(replace(ASKED, config="chain.yaml", dry_run=True))
    shown = capsys.readouterr().out
    assert "two.b: 1 node(s) x 2 task(s), 1440 min a job, profile ./c.yaml, after two.a" in shown
    assert "--dependency='afterok:<job of two.a>'" in shown


def _run_folder(home: Path, text: str) -> Path:
    run = home / "runs" / "old"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(text)
    return run


def test_a_run_folder_is_continued_with_its_own_recipe(home: Path) -> None:
    run = _run_folder(home, "name: demo\ntrain: {global_batch: 64, micro_batch: 8, seed: 3}\n")
    (stage,) = plan.plan(replace(ASKED, config=str(run), overrides=("train.micro_batch=4",))).stages
    assert stage.runs == (run,)
    assert (stage.loaded[0].config.train.seed, stage.loaded[0].config.train.micro_batch) == (3, 4)
    with pytest.raises(ConfigError, match="leave --array and --run out"):
        plan.plan(replace(ASKED, config=str(run), array=("optim.lr=1,2",)))
    with pytest.raises(ConfigError, match="neither a recipe nor a run folder"):
        plan.plan(replace(ASKED, config=str(home)))


def test_checkpoints_of_another_run_are_not_continued(home: Path) -> None:
    run = _run_folder(home, "train: {global_batch: 64, micro_batch: 8, seed: 3}\n")
    (stage,) = plan.plan(ASKED).stages
    checks.check_run(run, stage.loaded[0])
    (run / "checkpoints" / "step_00000001").mkdir(parents=True)
    (run / "checkpoints" / "step_00000001" / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"train.seed=3 \(config.yaml\), but this recipe says train.seed=0"):
        checks.check_run(run, stage.loaded[0])


def test_a_run_is_continued_as_its_newest_checkpoint_was_trained_and_not_as_its_file_says(home: Path) -> None:
    shards = home / "shards"
    shards.mkdir()
    for name in ("a-0.tar", "a-1.tar"):
        (shards / name).write_bytes(bytes(1024))
        (shards / name).with_suffix(".index.npz").touch()
    entries = {name: CatalogueEntry(2, 1024, "") for name in ("a-0.tar", "a-1.tar")}
    write_catalogue(shards, entries)
    text = "train: {global_batch: 64, micro_batch: 8}\ndata: {train: shards}\n"
    run = _run_folder(home, text)
    config = loads(text).config
    data = resume_rules.look(config)
    assert data is not None and data[0]["samples"] == 4
    manifest = Manifest(
        1, 64, 1, 0, "fp32", (), {}, files={"rank_00000.safetensors": Digest(100, 8, "0" * 8)},
        meta={resume_rules.META: resume_rules.record(config, data, Classes(1000))},
    )  # fmt: skip
    (run / "checkpoints" / "step_00000001").mkdir(parents=True)
    (run / "checkpoints" / "step_00000001" / "manifest.json").write_bytes(manifest.render())

    def continued() -> None:
        (stage,) = plan.plan(replace(ASKED, config=str(run))).stages
        checks.check_run(run, stage.loaded[0])

    continued()
    (run / "config.yaml").write_text(text.replace("{train: shards}", "{train: shards, lanes: 8}"))
    with pytest.raises(
        ConfigError, match=r"data.lanes=64 \(step_00000001\), but .*config.yaml says data.lanes=8"
    ):
        continued()
    (run / "config.yaml").write_text(text)
    write_catalogue(shards, {**entries, "a-1.tar": CatalogueEntry(2, 1536, "")})
    with pytest.raises(UserError, match=r"data.train=shards: .*now as many with other sizes"):
        continued()
    shards.rename(home / "elsewhere")  # as on a host that does not see the data: the job's start does
    continued()


def test_a_submission_loads_no_torch() -> None:
    code = "import sys, dattrain.submit.submission; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_that_is_no_run_is_left_alone(home: Path) -> None:
    (home / "notes").mkdir()
    (home / "notes" / "a.txt").write_text("mine")
    (stage,) = plan.plan(ASKED).stages
    with pytest.raises(ConfigError, match="not empty and not a run folder"):
        checks.check_run(home / "notes", stage.loaded[0])


def _check(changes: SubmitRequest, speed: float | None = None) -> None:
    for stage in plan.plan(changes).stages:
        checks.check_stage(stage, speed)


def test_every_number_of_nodes_in_a_range_must_divide_the_batch(home: Path) -> None:
    _check(replace(ASKED, nodes="1-2"))
    with pytest.raises(ConfigError, match=r"with 3 node\(s\) of 2 device\(s\)"):
        _check(replace(ASKED, nodes="1-4"))
    with pytest.raises(ConfigError, match="fewest-most"):
        _check(replace(ASKED, nodes="4-2"))


def test_time_limits_have_room_for_a_step_and_a_save(home: Path) -> None:
    with pytest.raises(ConfigError, match="not longer than the profile's signal_delay_s=60"):
        _check(replace(ASKED, time="1"))
    _check(replace(ASKED, time="2"))
    with pytest.raises(ConfigError, match="signal_delay_s=60 of profile"):
        _check(replace(ASKED, time="2"), speed=1.0)
    with pytest.raises(ConfigError, match="--time of 2 min is shorter than"):
        _check(replace(ASKED, time="2"), speed=1.2)
    _check(replace(ASKED, time="3"), speed=1.2)


def test_a_measured_speed_is_used_when_a_run_is_continued(home: Path) -> None:
    run = _run_folder(home, "train: {global_batch: 64, micro_batch: 8}\ndata: {train: shards}\n")
    (run / "metrics.jsonl").write_text('{"step": 1, "images_per_s": 0.5}\n')
    assert checks.measured(run, 64) == (128.0, None)
    with pytest.raises(ConfigError, match="one step"):
        _check(replace(ASKED, config=str(run), time="3"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"retries": -1}, "0 or more"),
        ({"after": "77x"}, "neither a job id nor a run folder"),
        ({"cluster": "local", "nodes": "2"}, "this machine alone"),
        (
            {"cluster": "local", "array": ("optim.lr=1,2",), "array_parallel": 2},
            "on --cluster local the runs of an array follow",
        ),
        ({"cluster": "local", "after": "7"}, "--after needs a Slurm cluster"),
        ({"array_parallel": 2}, "1 or more runs of an --array at a time"),
        ({"array": ("optim.lr=1,2",), "array_parallel": 0}, "1 or more runs of an --array at a time"),
        ({"folder": "runs/50%j"}, "'%' in a path does not survive Slurm"),
        ({"folder": "runs/back\\slash"}, r"'\\\\' in a path does not survive Slurm"),
        ({"folder": "runs/" + "ä" * 128}, "a name of 256 bytes"),
        ({"folder": "runs/two\nlines"}, r"'\\n' in a path does not survive Slurm"),
        ({"folder": "runs/a\tb"}, r"'\\t' in a path"),
        ({"folder": "runs/a", "overrides": ('name="a\\nb"',)}, "cannot be the name of a job"),
        ({"folder": "runs/a,b", "cluster": "./box.yaml"}, "',' in a path does not survive a list of mounts"),
    ],
)
def test_refusals(home: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        _check(replace(ASKED, **changes))  # type: ignore[arg-type]


def test_paths_that_a_shell_would_read_otherwise_are_fine(home: Path) -> None:
    for name in ("with space", "it's", "do$HOME", "größe-実験", 'dq"x', "semi;colon&x", "a,b:c"):
        _check(replace(ASKED, folder=f"runs/{name}"))


DETECT = ["coco_retinanet_dat_tiny_1x", "init.from=.", "data.train=objects.json", "model.num_classes=3"]
SEGMENT = ["ade20k_upernet_dat_tiny", "data.train=maps/images/train", "init.from=."]
IMAGENET = ["in22k_dat_base_224", "data.train=shards", "--nodes", "4"]


def _said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code of a command, and its last line of error without the verb."""
    code = main([*words])
    return code, capsys.readouterr().err.strip().splitlines()[-1].partition(": ")[2]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([*IMAGENET, "--gpus-per-node", "0"], r"CPUs alone .*generic.* 4 node\(s\) x 1 .*takes at least \d years by the plan's estimate.*--yes"),
        (["ade20k_upernet_dat_tiny", "init.from=.", "data.train=x", "--gpus-per-node", "0"], "it would train on CPUs alone"),
        (["in22k_dat_base_224"], "data.train is not set: add data.train=SHARDS"),
        (["in22k_to_in1k_384", "pretrain.data.train=x"], "finetune: data.train is not set: add finetune.data.train=SHARDS"),
        ([*IMAGENET, "--gpus-per-node", "3"], r"with 4 node\(s\) of 3 device\(s\)"),
        ([*IMAGENET, "train.early_stopping_patience=3"], "data.val is not set"),
        (["in1k_dat_base_384", "data.train=x"], "is a fine-tune .*init.from is not set"),
        (["r.yaml", "data.train=pictures"], r"data.train=pictures has 2 classes \(cat, dog\), but model.num_classes=1000; set model.num_classes=2"),
        (["r.yaml", "data.train=labels"], r"data.train=labels has labels up to 1000, but model.num_classes=1000"),
        (["r.yaml", "data.train=maps/images/train"], "an image and a map .* each, and task.kind=classification needs"),
        (SEGMENT, r"data.train=maps/images/train has 3 classes \(wall, sky, tree\), but model.num_classes=150"),
        (DETECT, r"data.train=objects.json has 2 classes \(cat, dog\), but model.num_classes=3; set model.num_classes=2: detection has no"),
        ([*DETECT[:2], "data.train=maps/images/train"], r"a map .* each, and task.kind=detection needs objects"),
        (["in1k_to_ade20k", "pretrain.data.train=x", "segment.data.train=maps/images/train"], r"in1k_to_ade20k.segment: data.train=.* has 3 classes"),
        (["in1k_to_ade20k", "segment.model.num_classes=256"], r"in1k_to_ade20k.segment: .*255 at most"),
        (["r.yaml", "data.train=four"], r"data.train=four has 4 samples, fewer than one train.global_batch=64"),
    ],
)  # fmt: skip
def test_plan_dry_run_and_submit_refuse_alike(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    expected: str,
) -> None:
    def figures(*_: object) -> None:
        raise UserError("counting activations of large networks takes half a minute")

    monkeypatch.setattr(plan_verb, "_figures", figures)
    (home / "four").mkdir()
    for name in ("a-0", "a-1"):
        (home / "four" / f"{name}.tar").write_bytes(bytes(1024))
        (home / "four" / f"{name}.index.npz").touch()
    write_catalogue(home / "four", {f"a-{n}.tar": CatalogueEntry(2, 1024, "") for n in (0, 1)})
    (home / "labels").mkdir()
    for suffix in ("tar", "index.npz"):
        (home / "labels" / f"a-0.{suffix}").write_bytes(bytes(1 << 16))
    write_catalogue(home / "labels", {"a-0.tar": CatalogueEntry(64, 1 << 16, "", max_label=1000)})
    for folder in ("pictures/cat", "pictures/dog", "maps/images/train", "maps/annotations/train"):
        (home / folder).mkdir(parents=True)
    (home / "maps" / "images" / "train" / "a.jpg").touch()
    (home / "maps" / "classes.txt").write_text("wall\nsky\ntree\n")
    (home / "a.jpg").touch()
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    annotations = [{"image_id": 1, "category_id": number, "bbox": [1, 1, 8, 8]} for number in (1, 2)]
    content = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "categories": categories,
        "annotations": annotations,
    }
    (home / "objects.json").write_text(json.dumps(content))
    code, message = _said(capsys, "submit", *words)
    assert code and re.search(expected, message), message
    assert _said(capsys, "submit", *words, "--dry-run") == (code, message)
    assert _said(capsys, "plan", *words) == (code, message)
    assert not (home / "runs").exists()


def test_what_is_absurd_on_cpus_may_be_meant(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = SubmitRequest("in22k_dat_base_224", ("data.train=shards",), gpus_per_node=0)
    with pytest.raises(ConfigError, match="years by the plan's estimate"):
        submission.submit(replace(asked, dry_run=True))
    assert submission.submit(replace(asked, dry_run=True, yes=True)) == 0
    assert submission.submit(replace(asked, dry_run=True, gpus_per_node=8)) == 0
    short = ("data.train=shards", "train.max_steps=50", "train.global_batch=64", "train.micro_batch=16")
    assert submission.submit(replace(asked, dry_run=True, overrides=short)) == 0
    # At a speed that is known the bound is no longer asked.
    assert submission.submit(replace(asked, dry_run=True, images_per_second=1e6)) == 0


def test_without_slurm_or_data_it_says_so_and_writes_nothing(home: Path) -> None:
    with pytest.raises(UserError, match="sbatch is not on the PATH"):
        submission.submit(ASKED)
    with pytest.raises(ConfigError, match="data.train is not set"):
        submission.submit(replace(ASKED, overrides=("data.train=null",)))
    assert not (home / "runs").exists()


def test_folders_of_chains_arrays_and_parents(home: Path) -> None:
    for name in ("a", "b"):
        _run = home / "runs" / "array" / name
        _run.mkdir(parents=True)
        (_run / "config.yaml").write_text("")
    assert [p.name for p in run_folders.find(["runs/array"])] == ["a", "b"]
    assert [p.name for p in run_folders.find(["runs"])] == ["a", "b"]
    assert [p.name for p in run_folders.find(["runs/array/a"])] == ["a"]
    with pytest.raises(ConfigError, match="no run folder"):
        run_folders.find(["nowhere"])
