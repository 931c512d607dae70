"""What a resumed run may not change is judged by what its newest manifest recorded, not by a file that anybody may edit."""

import json
from pathlib import Path

import pytest
import scenes
import yaml

from dattrain.config.load import dump, loads
from dattrain.data import identity
from dattrain.data.classes import Classes
from dattrain.data.classes import write as write_classes
from dattrain.data.source.index import CatalogueEntry
from dattrain.data.source.shards import Shards
from dattrain.engine import resume_rules
from dattrain.errors import ConfigError, UserError
from dattrain.state.format.manifest import Manifest
from dattrain.state.format.rank_file import Digest

RECIPE = "model: {img_size: [64, 96], overrides: {offsets: false}}\ndata: {train: /data/train}\n"
CLASSES = Classes(3, ("ant", "bee", "cow"), "data.train=/data/train")


def parts(*counts):
    names = [f"/data/train-{n}.tar" for n in range(len(counts))]
    return identity.of_shards(Shards.build(names, [CatalogueEntry(count, 9 * count, "") for count in counts]))


def checkpoint(run, step, meta):
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    files = {"rank_00000.safetensors": Digest(100, 8, "0" * 8)}
    manifest = Manifest(step, 0, 1, 0, "fp32", ("param",), {}, files=files, meta=meta)
    (folder / "manifest.json").write_bytes(manifest.render())


@pytest.fixture
def run(tmp_path):
    """A run with two checkpoints, of which the newer one is of this recipe."""
    config = loads(RECIPE).config
    meta = {
        "samples_per_epoch": 384,
        resume_rules.META: resume_rules.record(config, parts(*[64] * 6), CLASSES),
    }
    checkpoint(tmp_path, 10, {})
    checkpoint(tmp_path, 20, json.loads(json.dumps(meta)))
    (tmp_path / "config.yaml").write_text(dump(config))
    return tmp_path


EDITS = [
    ("train.seed", 0, 7),
    ("train.global_batch", 1024, 2048),
    ("data.lanes", 64, 4),
    ("data.window", 4, 2),
    ("data.shuffle", True, False),
    ("data.reader", "index", "webdataset"),
    ("model.drop_path", 0.0, 0.5),
    ("model.img_size", [64, 96], 64),
    ("model.overrides", {"offsets": False}, {}),
]


@pytest.mark.parametrize("key, was, now", EDITS)
def test_an_edited_config_is_refused_as_the_command_line_is(run, key, was, now):
    changed = loads(
        RECIPE.replace("{offsets: false}", "{}") if now == {} else RECIPE, [f"{key}={now}"]
    ).config
    with pytest.raises(ConfigError, match=r"this recipe says") as error:
        resume_rules.check_settings(run, changed, *resume_rules.newest(run))
    value = tuple(now) if isinstance(now, list) else now
    assert f"has checkpoints of {key}={was} (step_00000020), but this recipe says {key}={value}" in str(
        error.value
    )
    (run / "config.yaml").write_text(dump(changed))
    with pytest.raises(
        ConfigError, match=r"config\.yaml says .* Put it back, or choose another --run folder"
    ):
        resume_rules.check_settings(run, changed, *resume_rules.newest(run))
    (run / "config.yaml").unlink()
    with pytest.raises(ConfigError):
        resume_rules.check_settings(run, changed, *resume_rules.newest(run))


def test_a_folder_of_images_is_no_run_folder_and_one_of_a_jobs_files_is(tmp_path, val_folder):
    for folder in (val_folder, next(val_folder.iterdir())):
        with pytest.raises(ConfigError, match="is no run folder, it holds .*png; choose another --run"):
            resume_rules.check_folder(folder)
    for name in ("logs", "submit"):
        (tmp_path / name).mkdir()
    resume_rules.check_folder(tmp_path)
    (tmp_path / "slurm-1.out").touch()
    resume_rules.check_folder(tmp_path)
    resume_rules.check_folder(tmp_path / "new")
    (tmp_path / "train-0000.tar").touch()
    with pytest.raises(ConfigError, match="train-0000.tar"):
        resume_rules.check_folder(tmp_path)
    (tmp_path / "config.yaml").touch()
    resume_rules.check_folder(tmp_path)


def test_a_run_of_the_reader_that_is_gone_cannot_be_put_back(run):
    config = loads(RECIPE).config
    then = {"settings": {**resume_rules.settings(config), "data.reader": "dali"}}
    with pytest.raises(ConfigError, match=r"of data\.reader=dali .* depends on it\. Choose another --run"):
        resume_rules.check_settings(run, config, "step_00000020", {resume_rules.META: then})


def test_what_may_change_may_even_where_the_file_is_gone(run):
    (run / "config.yaml").write_text("no: [yaml")
    free = ["train.max_steps=9", "optim.lr=1", "data.train=/moved", "train.micro_batch=8", "zero.stage=1"]
    resume_rules.check_settings(run, loads(RECIPE, free).config, *resume_rules.newest(run))


def test_old_checkpoints_are_compared_with_the_file_and_that_is_said(run, caplog):
    caplog.set_level("INFO")
    name, meta = "step_00000010", {}
    resume_rules.check_settings(run, loads(RECIPE).config, name, meta)
    assert (
        f"step_00000010 records no settings; they are compared with {run / 'config.yaml'}" in caplog.messages
    )
    with pytest.raises(
        ConfigError, match=r"train\.seed=0 \(config\.yaml\), but this recipe says train\.seed=1"
    ):
        resume_rules.check_settings(run, loads(RECIPE, ["train.seed=1"]).config, name, meta)
    resume_rules.check_data(run, loads(RECIPE).config, name, meta, parts(1, 2), 3)
    with pytest.raises(UserError, match=r"384 samples an epoch, now 383"):
        resume_rules.check_data(run, loads(RECIPE).config, name, {"samples_per_epoch": 384}, parts(383), 383)


def test_the_newest_manifest_that_can_be_read_is_the_judge(run):
    (run / "checkpoints/step_00000030").mkdir()
    assert resume_rules.newest(run)[0] == "step_00000020"
    (run / "checkpoints/step_00000020/manifest.json").write_text("{}")
    assert resume_rules.newest(run) == ("step_00000010", {})
    (run / "checkpoints/step_00000010/manifest.json").write_text("{}")
    assert resume_rules.newest(run) == ("step_00000030", {})
    assert resume_rules.newest(run / "checkpoints") is None


def test_data_repacked_with_as_many_samples_is_refused(run):
    config = loads(RECIPE).config
    resume_rules.check_data(run, config, *resume_rules.newest(run), parts(*[64] * 6), 384)
    with pytest.raises(UserError, match=r"data\.train=/data/train: .* 6 shards of 384 samples, now 4 of 384"):
        resume_rules.check_data(run, config, *resume_rules.newest(run), parts(*[96] * 4), 384)


def test_class_numbers_are_judged_by_the_manifest_and_named_by_the_file(run):
    name, meta = resume_rules.newest(run)
    other = Classes(3, ("ant", "cow", "bee"), "data.train=/data/train")
    write_classes(run, other)
    resume_rules.check_classes(run, name, meta, CLASSES)  # the file was edited, the data are the same
    with pytest.raises(UserError, match="was trained with other class names, or another order of them"):
        resume_rules.check_classes(run, name, meta, other)
    write_classes(run, CLASSES)
    with pytest.raises(UserError, match="class 1 was 'bee' in this run, and is 'cow'"):
        resume_rules.check_classes(run, name, meta, other)


def test_a_decoder_and_the_sizes_of_its_images_stay_and_what_is_drawn_may_change():
    recipe = yaml.safe_dump(scenes.RECIPE)
    settings = resume_rules.settings(loads(recipe).config)
    for key in (
        "task.kind",
        "task.norm",
        "task.aux_weight",
        "geometry.crop",
        "geometry.scale",
        "geometry.short_side",
    ):
        assert key in settings
    assert not {"geometry.distortion", "geometry.max_class_share", "geometry.pad_to"} & set(settings)
    meta = {resume_rules.META: {"settings": json.loads(json.dumps(settings))}}
    with pytest.raises(
        ConfigError, match=r"of task\.norm=group .* says task\.norm=batch; the weights depend"
    ):
        resume_rules.check_settings(Path(), loads(recipe, ["task.norm=batch"]).config, "step_00000020", meta)
    with pytest.raises(ConfigError, match=r"of geometry\.crop=64 .* says geometry\.crop=\[64, 96\]"):
        resume_rules.check_settings(
            Path(), loads(recipe, ["geometry.crop=[64,96]"]).config, "step_00000020", meta
        )
    free = ["eval.mode=slide", "eval.flip=true", "geometry.distortion=false"]
    resume_rules.check_settings(Path(), loads(recipe, free).config, "step_00000020", meta)
