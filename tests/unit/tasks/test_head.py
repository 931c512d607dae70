"""``init.head``: rows of a classifier are joined by the names of classes, wherever these are known from."""

import pytest

from dattrain.config.load import dump
from dattrain.config.schema import Config
from dattrain.data import classes, labels
from dattrain.data.classes import Classes
from dattrain.errors import ConfigError
from dattrain.pretrained import weights
from dattrain.pretrained.pretrained_cfg import PretrainedCfg
from dattrain.tasks.head import check_same, class_map, source_classes


@pytest.fixture
def run(tmp_path):
    """A run folder; gets the names that it notes, and ``data.labels``."""

    def make(names=None, label_set=None):
        folder = tmp_path / "run"
        (folder / "checkpoints" / "step_1").mkdir(parents=True)
        (folder / "config.yaml").write_text(dump(Config.model_validate({"data": {"labels": label_set}})))
        if names is not None:
            classes.write(folder, Classes(len(names), tuple(names)))
        return folder

    return make


@pytest.mark.parametrize("below", ["", "checkpoints", "checkpoints/step_1"])
def test_a_run_folder_names_its_classes(run, below):
    assert source_classes(run(["a", "b"]) / below, 2, guess=True).names == ("a", "b")


def test_a_label_set_names_them_where_the_run_does_not(run):
    assert (
        source_classes(run(label_set="imagenet-1k"), 1000, guess=False).names
        == labels.label_set("imagenet-1k").synsets
    )


def test_bare_numbers_are_guessed_by_size_for_map_alone(run):
    folder = run([])
    assert len(source_classes(folder, 21841, guess=True).names) == 21841
    assert source_classes(folder, 21841, guess=False).names == ()
    assert source_classes(folder, 12, guess=True).names == ()


def test_a_weights_file_names_its_classes(tmp_path):
    path = tmp_path / "w.safetensors"
    weights.save(path, {}, PretrainedCfg("dat_atto", 2, (64, 64), classes=("a", "b")))
    assert source_classes(path, 2, guess=True).names == ("a", "b")
    weights.save(path, {}, PretrainedCfg("dat_atto", 1000, (64, 64), labels="imagenet-1k"))
    assert source_classes(path, 1000, guess=False).names[0] == "n01440764"


def test_map_joins_any_names():
    joined = class_map(Classes(3, ("dog", "cow", "ant")), Classes(2, ("ant", "dog"), "init.from=x"))
    assert joined.index.tolist() == [1, -1, 0]
    assert joined.missing == ("cow",) and joined.report().endswith("are in init.from=x; missing: cow")


@pytest.mark.parametrize(
    ("target", "source", "message"),
    [
        (Classes(2), Classes(2, ("a", "b")), "needs the names of the new head's classes"),
        (
            Classes(2, ("a", "b")),
            Classes(2, (), "init.from=x"),
            "what the 2 classes of init.from=x are called",
        ),
    ],
)
def test_map_needs_both_names(target, source, message):
    with pytest.raises(ConfigError, match=message):
        class_map(target, source)


def test_keep_is_refused_where_a_row_would_change_its_class():
    old = Classes(2, ("a", "b"), "init.from=x")
    check_same(Classes(2, ("a", "b")), old)
    check_same(Classes(2), old)
    check_same(Classes(2, ("a", "b")), Classes(2))
    with pytest.raises(
        ConfigError, match="class 0 is 'a' in init.from=x and 'b' by data.train=y; init.head=map joins"
    ):
        check_same(Classes(2, ("b", "a"), "data.train=y"), old)


def test_a_checkpoints_card_has_the_names_that_its_run_noted(run, tmp_path):
    folder = run(["b", "a"])
    config = Config.model_validate({"model": {"num_classes": 2}, "data": {"train": str(tmp_path / "gone")}})
    assert weights.class_names(folder, config) == ("b", "a")
    (folder / classes.FILE).unlink()
    assert weights.class_names(folder, config) == ()
    assert weights.class_names(folder, config, ["c", "d"]) == ("c", "d")
    for name in ("dog", "ant"):
        (tmp_path / "gone" / name).mkdir(parents=True)
        (tmp_path / "gone" / name / "0.jpg").write_bytes(b"x")
    assert weights.class_names(folder, config) == ("ant", "dog"), (
        "an older run: its training set's, never data.val's"
    )
