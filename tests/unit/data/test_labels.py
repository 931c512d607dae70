"""Label sets and the maps between them."""

import numpy as np
import pytest

from dattrain.data.labels import SIZES, check_head, class_map, infer, label_set, read_synsets
from dattrain.errors import ConfigError, UserError


@pytest.mark.parametrize(
    ("name", "classes"),
    [("imagenet-1k", 1000), ("imagenet-22k", 21841), ("imagenet-21k-p", 11221), ("imagenet-21k-p", 10450)],
)
def test_sizes_and_order(name, classes):
    labels = label_set(name, classes=classes)
    assert len(labels) == len(set(labels.synsets)) == classes
    assert list(labels.synsets) == sorted(labels.synsets)
    assert infer(classes) == name


def test_names():
    labels = label_set("imagenet-1k")
    assert labels.synsets[0] == "n01440764"
    assert labels.names()[0].startswith("tench")


def test_22k_to_1k_matches_all_but_one():
    source, target = label_set("imagenet-22k"), label_set("imagenet-1k")
    joined = class_map(target, source)
    assert joined.missing == ("n04399382",)
    assert "999 of 1000" in joined.report() and "n04399382 (teddy" in joined.report()
    assert joined.index.dtype == np.int64 and joined.index.shape == (1000,)
    for label, at in enumerate(joined.index):
        assert target.synsets[label] == "n04399382" if at < 0 else source.synsets[at] == target.synsets[label]


def test_a_map_onto_itself_is_the_identity():
    labels = label_set("imagenet-21k-p")
    joined = class_map(labels, labels)
    assert (joined.index == np.arange(11221)).all() and "missing" not in joined.report()


@pytest.mark.parametrize(
    ("name", "classes", "words"),
    [
        ("imagenet-22k", 19167, "21,841.*19,167 are imagenet-22k-winter21's"),
        ("imagenet-1k", 1001, "1,000"),
        ("imagenet-21k-p", 21841, "11,221 or 10,450"),
        ("cifar", 10, "not one of"),
    ],
)
def test_a_head_of_another_size_is_refused(name, classes, words):
    with pytest.raises(ConfigError, match=words):
        check_head(name, classes)


def test_a_head_that_fits():
    check_head(None, 37)
    for name, sizes in SIZES.items():
        for size in sizes:
            check_head(name, size)


def test_winter21_from_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="synsets.txt"):
        label_set("imagenet-22k-winter21")
    fall11 = label_set("imagenet-22k").synsets
    kept = fall11[:19167]
    (tmp_path / "synsets.txt").write_text("\n".join(kept))
    assert label_set("imagenet-22k-winter21", classes=19167).synsets == kept
    (tmp_path / "synsets.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(kept).encode())
    assert label_set("imagenet-22k-winter21").synsets == kept
    (tmp_path / "synsets.txt").write_text("\n".join(fall11))
    with pytest.raises(UserError, match="21,841 synsets"):
        label_set("imagenet-22k-winter21")
    (tmp_path / "synsets.txt").write_text("\n".join((*kept[:-1], "n99999999")))
    with pytest.raises(UserError, match="1 of them not in fall11"):
        label_set("imagenet-22k-winter21")
    (tmp_path / "synsets.txt").write_text("\n".join((*kept[1:], kept[0])))
    with pytest.raises(UserError, match="is not sorted"):
        label_set("imagenet-22k-winter21")


@pytest.mark.parametrize(
    ("text", "words"), [("n01440764\nn01440764\n", "twice"), ("tench\n", "not a synset")]
)
def test_a_list_that_is_none(tmp_path, text, words):
    path = tmp_path / "synsets.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        read_synsets(path)


@pytest.mark.parametrize(("classes", "words"), [(1001, "background"), (21842, "teddy"), (21843, "Google")])
def test_other_numberings_are_called_what_they_are(classes, words):
    with pytest.raises(ConfigError, match=f"{words}.*leave data.labels null"):
        check_head("imagenet-22k", classes)


def test_12k_is_a_set():
    assert len(label_set("imagenet-12k", classes=11821)) == 11821 and infer(11821) == "imagenet-12k"
