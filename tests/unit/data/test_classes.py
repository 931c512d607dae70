"""A class has one number, decided once and asked for by name: ``dattrain.data.classes`` and who uses it."""

import io
import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from faulty import serving
from PIL import Image

from dattrain.config.schema import Config
from dattrain.data import classes, labels
from dattrain.data.classes import Classes, decide
from dattrain.data.factory import eval_loader, open_split, train_loader
from dattrain.data.prepare.index_shards import index_shards, link_shards
from dattrain.data.prepare.pack import PackOptions, pack
from dattrain.data.prepare.sources import open_source
from dattrain.data.source import remote
from dattrain.data.source.dataset import open_dataset
from dattrain.data.source.download import Refused
from dattrain.data.source.fields import sampled_class_names
from dattrain.data.source.manifest import class_names
from dattrain.errors import ConfigError, UserError

CPU = torch.device("cpu")


def jpeg(seed):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def folder(root, names, each=4):
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for k in range(each):
            (root / name / f"{name}{k}.jpg").write_bytes(jpeg(7 * number + k))
    return str(root)


def config(train=None, val=None, num_classes=3, **data):
    return Config.model_validate({
        "model": {"num_classes": num_classes},
        "data": {"train": train, "val": val, "lanes": 1, "workers": 0, **data},
        "train": {"global_batch": 4, "micro_batch": 4},
        "eval": {"batch": 64},
    })  # fmt: skip


def seen(loader):
    """Class numbers by the name in front of the file's number."""
    found = {}
    for batch in loader:
        for key, label in zip(batch.keys, batch.labels.tolist()):
            found.setdefault(re.search("[a-z]+(?=[0-9]*(.jpg)?$)", key)[0], set()).add(label)
    return found


def packed(source, out, split):
    pack(open_dataset(source), out, PackOptions(split=split, per_shard=5))
    return str(out / f"{split}-*.tar")


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("decoder", ["cpu", "dali"])
def test_validation_takes_the_training_sets_numbers(tmp_path, shards, decoder):
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    train = folder(tmp_path / "train", ["ant", "bee", "cat"])
    val = folder(tmp_path / "val", ["bee", "cat"])
    if shards:
        train, val = packed(train, tmp_path / "a", "train"), packed(val, tmp_path / "b", "val")
    cfg = config(train, val, decoder=decoder)
    loader = train_loader(cfg, rank=0, world=1, samples_seen=0, device=CPU, img_size=32)
    assert loader.classes.names == ("ant", "bee", "cat")
    loader.close()
    evaluation = eval_loader(cfg, loader.classes, rank=0, world=1, device=CPU, img_size=32)
    assert seen(evaluation) == {"bee": {1}, "cat": {2}}


def test_a_class_that_the_training_set_has_not_is_refused_by_name(tmp_path):
    train = folder(tmp_path / "train", ["a", "b", "c"])
    val = folder(tmp_path / "val", ["b", "c", "d"])
    _, known = open_split(config(train), "train", None, rank=0, world=1)
    with pytest.raises(UserError, match=r"val: 'd' is no class of data.train=.*\(a, b, c\); 1 of its 3"):
        eval_loader(config(train, val), known, rank=0, world=1, device=CPU, img_size=32)


@pytest.mark.parametrize("source", ["folder", "shards"])
def test_synsets_take_the_label_sets_numbers(tmp_path, source, caplog):
    synsets = labels.label_set("imagenet-1k").synsets
    train = folder(tmp_path / "train", [synsets[3], synsets[500], synsets[999]])
    if source == "shards":
        train = packed(train, tmp_path / "out", "train")
    cfg = config(train, num_classes=1000, labels="imagenet-1k")
    with caplog.at_level(logging.WARNING):
        dataset, known = open_split(cfg, "train", None, rank=0, world=1)
    assert known.names == synsets
    found = {dataset.label(s, i) for s, n in enumerate(dataset.counts) for i in range(n)}
    assert found == {3, 500, 999}
    assert "has images of 3 of 1000 classes" in caplog.text
    assert {dataset.read(0, 0).label} <= found


def test_folders_that_are_no_class_of_the_label_set(tmp_path):
    train = folder(tmp_path / "train", ["ant", "bee"])
    with pytest.raises(UserError, match=r"'ant' is no class of data.labels=imagenet-1k"):
        open_split(config(train, num_classes=1000, labels="imagenet-1k"), "train", None, rank=0, world=1)


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("outputs", [2, 4, 1000])
def test_as_many_classes_as_outputs(tmp_path, shards, outputs):
    train = folder(tmp_path / "train", ["ant", "bee", "cat"])
    if shards:
        train = packed(train, tmp_path / "out", "train")
    with pytest.raises(
        ConfigError, match=rf"has 3 classes \(ant, bee, cat\), but model.num_classes={outputs}; set"
    ):
        open_split(config(train, num_classes=outputs), "train", None, rank=0, world=1)


def test_shards_that_number_their_classes_differently(tmp_path, make_shards):
    a = packed(folder(tmp_path / "a", ["ant", "bee"]), tmp_path / "sa", "train")
    b = packed(folder(tmp_path / "b", ["bee", "cat"]), tmp_path / "sb", "train")
    with pytest.raises(
        UserError, match="number their classes each in its own way: label 0 to 1 are ant, bee there"
    ):
        open_dataset(f"{a}::{b}")
    with pytest.raises(UserError, match="one has names of its classes and the other has none"):
        open_dataset(f"{a}::{make_shards()}/*.tar")


def test_a_damaged_manifest_is_named(tmp_path):
    spec = packed(folder(tmp_path / "a", ["ant", "bee"]), tmp_path / "s", "train")
    (tmp_path / "s" / "_train.manifest.json").write_text('{"classes": ["a"], "shards": 3}')
    with pytest.raises(UserError, match=r"_train.manifest.json: .*; restore it"):
        open_dataset(spec)


@pytest.mark.parametrize("names", [["crane", "crane"], {"bee": 1, "ant": 0}, "ab"])
def test_a_manifest_that_is_written_by_hand(tmp_path, names):
    spec = packed(folder(tmp_path / "a", ["ant", "bee"]), tmp_path / "s", "train")
    edited(spec, classes=names)
    with pytest.raises(UserError, match=r"_train.manifest.json: .*(comes twice|classes is no list)"):
        open_dataset(spec)


def test_a_manifest_is_held_against_the_samples(tmp_path):
    spec = packed(folder(tmp_path / "a", ["ant", "bee", "cat"]), tmp_path / "s", "train")
    edited(spec, classes=["bee", "cat", "dog"])
    with pytest.raises(UserError, match=r"'.*' by its .json and has label ., .* by the manifest beside it"):
        open_split(config(spec), "train", None, rank=0, world=1)


def test_other_labels_than_those_that_a_manifest_names(tmp_path):
    spec = packed(folder(tmp_path / "a", ["ant", "bee"]), tmp_path / "s", "train")
    with pytest.raises(UserError, match=r"calls its labels ant, bee, .*`dattrain data pack --label height`"):
        index_shards([spec.replace("*", "0000")], label="height")
    edited(spec, classes=None)
    index_shards([spec.replace("*", "0000")], label="height")
    assert open_dataset(spec.replace("*", "0000")).label(0, 0) == 24


def test_a_class_folder_that_is_not_called_in_utf8(tmp_path):
    name = "caf\udce9"
    folder(tmp_path / "a", ["bee", name])
    (tmp_path / "a" / name / "twice.jpg").write_bytes((tmp_path / "a" / name / f"{name}0.jpg").read_bytes())
    pack(open_dataset(str(tmp_path / "a")), tmp_path / "s", PackOptions(dedup=True))
    assert len(json.loads((tmp_path / "s" / "_duplicates.json").read_text(encoding="utf-8"))) == 1
    spec = str(tmp_path / "s" / "*.tar")
    dataset, known = open_split(config(spec, num_classes=2), "train", None, rank=0, world=1)
    assert known.names == ("bee", name)
    assert {said for _, _, said in sampled_class_names(dataset)} == set(known.names)
    json.loads(Path(spec).parent.joinpath("_train.manifest.json").read_text(encoding="utf-8"))


def edited(spec, **changes):
    """Change the manifest beside packed shards; None removes a key."""
    path = next(Path(spec).parent.glob("_*.manifest.json"))
    content = {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not None}
    path.write_text(json.dumps(content))


def test_labels_that_the_manifest_does_not_count(tmp_path):
    spec = packed(folder(tmp_path / "a", ["ant", "bee"]), tmp_path / "s", "train")
    edited(spec, histogram={"0": 4})
    dataset, _ = open_split(config(spec, num_classes=2), "train", None, rank=0, world=1)
    with pytest.raises(UserError, match="has label 1, of which its manifest counts no samples"):
        [dataset.label(s, i) for s, n in enumerate(dataset.counts) for i in range(n)]
    edited(spec, histogram={"0": 4, "2": 1})
    with pytest.raises(UserError, match="cannot be read .*label 2 of 2 classes"):
        open_dataset(spec)


def test_names_without_samples_are_no_class_of_a_set(tmp_path, caplog):
    folder(tmp_path / "train", ["ant", "bee", "cat"])
    packed(str(tmp_path / "train"), tmp_path / "out", "train")
    val = packed(folder(tmp_path / "val", ["bee"]), tmp_path / "out", "val")
    with caplog.at_level(logging.WARNING):
        dataset, _ = open_split(config(None, val, 2), "val", Classes(2, ("bee", "dog")), rank=0, world=1)
    assert {dataset.label(0, i) for i in range(4)} == {0}
    assert "has images of 1 of 2 classes; none of dog" in caplog.text


def test_a_part_that_is_indexed_elsewhere_keeps_the_names_of_the_set(tmp_path):
    spec = packed(folder(tmp_path / "val", ["bee", "cat"], each=8), tmp_path / "out", "val")
    shards = [str(path) for path in sorted(Path(spec).parent.glob("*.tar"))]
    mine = str(tmp_path / "mine")

    def index(some):
        index_shards(link_shards(some, mine))
        return open_split(config(None, mine), "val", Classes(3, ("ant", "bee", "cat")), rank=0, world=1)[0]

    for some in (shards[1:2], shards[2:3], shards):
        dataset = index(some)
        for shard, count in enumerate(dataset.counts):
            for i in range(count):
                name = re.search("-([a-z]+)", dataset.key(shard, i))[1]
                assert ("ant", "bee", "cat")[dataset.label(shard, i)] == name
    assert len(dataset.counts) == len(shards) > 3
    (tmp_path / "mine" / "val-0001.tar").unlink()
    with pytest.raises(UserError, match=r"mine/val-0001.tar: is missing, though"):
        open_dataset(mine)
    (tmp_path / "mine" / "_val.manifest.json").write_bytes((tmp_path / "out/_val.manifest.json").read_bytes())
    with pytest.raises(UserError, match=r"_val.manifest.json: is there already, and is no copy of"):
        link_shards(shards, mine)


def test_shards_of_two_packings_are_not_linked_under_one_manifest(tmp_path):
    both = [("a", ["ant", "bee"], "0000"), ("b", ["bee", "cat"], "0001")]
    shards = []
    for place, names, number in both:
        packed(folder(tmp_path / f"{place}s", names), tmp_path / place, "train")
        shards.append(str(tmp_path / place / f"train-{number}.tar"))
    with pytest.raises(UserError, match=r"b/_train.manifest.json: names other classes than .*a/_train"):
        link_shards(shards, str(tmp_path / "mine"))


@pytest.mark.parametrize("how", ["manifest removed", "key misspelt", "shards renamed"])
def test_shards_that_lost_their_names_are_held_against_their_samples(tmp_path, how):
    out = tmp_path / "out"
    spec = packed(folder(tmp_path / "val", ["bee", "cat"]), out, "val")
    if how == "manifest removed":
        (out / "_val.manifest.json").unlink()
    elif how == "key misspelt":
        edited(spec, classes=None)
    else:
        spec = str(tmp_path / "other")
        (tmp_path / "other").mkdir()
        for path in out.glob("val-*"):
            (tmp_path / "other" / path.name.replace("val", "my-val")).write_bytes(path.read_bytes())
    known = Classes(3, ("ant", "bee", "cat"), "the network")
    with pytest.raises(
        UserError, match=r"'(bee|cat)' by its .json and has label [01], but .* is class [12] by the network"
    ):
        open_split(config(None, spec), "val", known, rank=0, world=1)


@pytest.mark.parametrize("how", ["small", "large", "large, knows no ranges"])
def test_remote_shards_without_names_are_held_against_some_samples(tmp_path, how, monkeypatch):
    out, cache = tmp_path / "out", tmp_path / "cache"
    packed(folder(tmp_path / "val", ["bee", "cat"]), out, "val")
    (out / "_val.manifest.json").unlink()
    if how != "small":
        monkeypatch.setattr(remote, "_SMALL", 0)
    known = Classes(3, ("ant", "bee", "cat"), "the network")
    with serving(out) as server:
        server.faults = ["whole"] * (8 if "no ranges" in how else 0)
        there = config(None, f"{server.url}/val-{{0000..0001}}.tar", cache_dir=str(cache))
        if "no ranges" in how:  # nothing is read for it
            dataset, _ = open_split(there, "val", known, rank=0, world=1)
            dataset.close()
        else:
            with pytest.raises(
                UserError, match="'bee' by its .json and has label 0, but 'bee' is class 1 by the"
            ):
                open_split(there, "val", known, rank=0, world=1)
    assert any(path.name.endswith(".tar") for path in cache.iterdir()) == (how == "small")


def test_two_sets_without_names_are_held_against_each_other(tmp_path, caplog):
    specs = [
        packed(folder(tmp_path / split, names), tmp_path / f"{split}-shards", split)
        for split, names in (("train", ["ant", "bee", "cat"]), ("val", ["bee", "cat"]))
    ]
    for manifest in tmp_path.glob("*-shards/_*.manifest.json"):
        manifest.unlink()
    _, known = open_split(config(*specs), "train", None, rank=0, world=1)
    assert known.names == ()
    with pytest.raises(
        UserError, match="'bee' by its .json and has label 0, but by those of data.train=.* 'bee' is 1"
    ):
        open_split(config(*specs), "val", known, rank=0, world=1)
    numbers = Classes(3, (), "it", frozenset({(0, "ant"), (1, "n01440764")}))
    assert classes.bare_numbers(numbers, [("k", 0, "ant "), ("l", 1, "tench"), ("m", 2, "bee")], "val")
    with pytest.raises(UserError, match="'bee' by its .json and has label 0, but by those of it 0 is 'ant'"):
        classes.bare_numbers(numbers, [("k", 0, "bee")], "val")


def test_bare_numbers_are_said(tmp_path, make_shards, caplog):
    spec = str(make_shards())
    names = tuple("abcdefghij")
    with caplog.at_level(logging.WARNING):
        open_split(config(None, spec, 10), "val", Classes(10, names), rank=0, world=1)
    assert "its labels are bare numbers, taken for those of the network (0 is a)" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        open_split(config(None, spec, 1000), "val", Classes(1000, IMAGENET), rank=0, world=1)
    assert not caplog.text
    with pytest.raises(UserError, match="called 1, 2, 3, ..., which are not their numbers"):
        open_split(config(None, spec, 10), "val", Classes(10, tuple(map(str, range(1, 11)))), rank=0, world=1)


IMAGENET = labels.label_set("imagenet-1k").synsets


@pytest.mark.parametrize(
    ("known", "names", "numbers"),
    [
        (Classes(3, ("a", "b", "c")), ["c", "a"], [2, 0]),
        (Classes(3, ("1", "2", "10")), ["10", "1"], [2, 0]),
        (Classes(2, ("caf\u00e9", "tea ")), ["tea", "cafe\u0301"], [1, 0]),  # a Mac's folder
        (Classes(1000, IMAGENET), [IMAGENET[999], IMAGENET[3]], [999, 3]),
        (Classes(1000), [IMAGENET[999], IMAGENET[3]], [999, 3]),  # unknown, and of ImageNet's size
        (Classes(1000, IMAGENET), ["10", "2"], [10, 2]),  # ImageNet-V2
        (Classes(1000), ["0010", "2"], [10, 2]),
        (Classes(2), ["x", "y"], [0, 1]),
    ],
)
def test_numbers(known, names, numbers):
    assert known.numbers(names, "it").tolist() == numbers


@pytest.mark.parametrize(
    ("known", "names"),
    [
        (Classes(3, ("cat", "dog", "horse")), ["dog", "equine", "feline"]),
        (Classes(3, ("cat", "dog", "horse")), ["airplane", "boat", "car"]),
        (Classes(3, ("1", "2", "10")), ["0", "1"]),
        (Classes(1000, IMAGENET), ["n99999999"]),
        (Classes(1000, IMAGENET), ["1000"]),
        (Classes(1000), ["n99999999"]),
        (Classes(1000), ["x"]),
        (Classes(1000), ["1", "01"]),
        (Classes(3), ["x", "y"]),
    ],
)
def test_names_that_are_no_class(known, names):
    with pytest.raises(UserError, match="^it: "):
        known.numbers(names, "it")


def test_classes_in_their_order_are_said(caplog):
    with caplog.at_level(logging.WARNING):
        Classes(2).numbers(["x", "y"], "it")
    assert "taken in their order: 0 is x, 1 is y" in caplog.text


def test_folders_called_by_numbers_are_said(caplog):
    with caplog.at_level(logging.WARNING):
        assert Classes(1000, IMAGENET).numbers(["1", "2"], "it").tolist() == [1, 2]
        assert not caplog.text
        Classes(3, ("ant", "bee", "cat")).numbers(["1", "2"], "it")
    assert "it: its classes are called by numbers, taken for those of the network (1 is bee)" in caplog.text


@pytest.mark.parametrize("names", [["caf\u00e9", "cafe\u0301"], ["ant", "ant "], ["crane", "crane"]])
def test_a_class_has_one_name_and_a_name_one_class(names, tmp_path):
    for use in (
        lambda: Classes(2, tuple(names)),
        lambda: decide(names, 2, None, "it"),
        lambda: Classes(2).numbers(names, "it"),
    ):
        with pytest.raises(UserError, match=r"class '.*' (comes twice|and '.*' differ in .* alone)"):
            use()
    if names[0] != names[1]:
        with pytest.raises(UserError, match="differ in .* alone"):
            packed(folder(tmp_path / "a", names), tmp_path / "s", "train")


def test_numbers_with_zeros_in_front_are_numbers():
    tens = tuple(f"{number:02d}" for number in range(10))
    assert classes.bare_numbers(Classes(10, tens), (), "it"), "a warning, and no error"


def test_22k_models_find_1k_folders_by_synset():
    known = decide(None, 21841, "imagenet-22k", "it")
    found = known.numbers(IMAGENET[:3], "it")
    assert [known.names[number] for number in found] == list(IMAGENET[:3])


def test_numbers_of_a_raw_22k_folder_depart_from_the_list():
    # Two synsets more than timm's list has: every class behind them has another number, and the same name.
    ours = labels.label_set("imagenet-22k").synsets
    raw = sorted({*ours, "n03933934", "n10148036"})
    known = decide(raw, len(raw), None, "data.train=raw")
    found = known.numbers(ours, "it")
    assert (found != np.arange(len(ours))).any()
    assert [known.names[number] for number in found] == list(ours)
    with pytest.raises(UserError, match="'n03933934' is no class of data.labels=imagenet-22k"):
        decide(raw, 21841, "imagenet-22k", "it").numbers(raw, "it")


def test_a_run_notes_its_classes(tmp_path):
    assert classes.read(tmp_path) is None
    known = Classes(2, ("a", "ö\udcff"), "data.train=x")
    classes.write(tmp_path, known)
    assert classes.read(tmp_path) == known.names
    classes.check(tmp_path, known)
    with pytest.raises(UserError, match=r"class 0 was 'a' in this run, and is 'b' by data.train=y"):
        classes.check(tmp_path, Classes(2, ("b", "a"), "data.train=y"))
    (tmp_path / classes.FILE).write_text('{"a": 0}')
    with pytest.raises(UserError, match="no list of class names"):
        classes.read(tmp_path)


def test_webdataset_streams_take_labels_as_they_stand(tmp_path):
    train = packed(folder(tmp_path / "t", [IMAGENET[3], IMAGENET[5]]), tmp_path / "s", "train")
    cfg = config(
        train.replace("*", "{0000..0001}"),
        num_classes=1000,
        labels="imagenet-1k",
        reader="webdataset",
        samples=8,
    )
    with pytest.raises(ConfigError, match="data.reader=webdataset takes labels as they stand"):
        train_loader(cfg, rank=0, world=1, samples_seen=0, device=CPU, img_size=32)


def test_packed_splits_of_a_folder_share_their_numbers(tmp_path):
    train = folder(tmp_path / "train", ["ant", "bee", "cat"])
    val = folder(tmp_path / "val", ["bee", "cat"])
    packed(train, tmp_path / "out", "train")
    dataset = open_dataset(packed(val, tmp_path / "out", "val"))
    assert {dataset.label(0, i) for i in range(dataset.counts[0])} == {1, 2}, "what .cls says to any reader"
    assert list(dataset.classes) == ["ant", "bee", "cat"]
    first = folder(tmp_path / "first", ["bee"])
    packed(first, tmp_path / "late", "val")
    with pytest.raises(UserError, match="pack the training set first"):
        packed(train, tmp_path / "late", "train")
    other = folder(tmp_path / "other", ["bee", "dog"])
    with pytest.raises(UserError, match=r"its split '(train|val)' has no class 'dog' \(ant, bee, cat\)"):
        packed(other, tmp_path / "out", "test")
    edited(str(tmp_path / "out" / "x"), classes=["ant", "bee", "dog"])
    with pytest.raises(UserError, match=r"its split 'train' and its split 'val' number their classes each"):
        packed(val, tmp_path / "out", "test")


@pytest.mark.parametrize("other", ["val", "train-val"])
def test_a_glob_that_also_names_validation_shards_is_not_trained_on(tmp_path, other):
    train = packed(folder(tmp_path / "t", ["ant", "bee"]), tmp_path / "s", "train")
    val = packed(folder(tmp_path / "v", ["ant", "bee"]), tmp_path / "s", other)
    both = str(tmp_path / "s" / ("*tr*-*.tar" if "-" in other else "*.tar"))

    def opened(spec, split="train"):
        return open_split(config(spec, spec, 2), split, None, rank=0, world=1)[0].counts.sum()

    with pytest.raises(UserError, match=rf"names the shards of train-\*.tar and of {other}-\*.tar, so that"):
        opened(both)
    one = train.replace("-*", "-[0-9]*")
    assert opened(one) == opened(val) == 8 and opened(f"{one}::{val}") == 16
    assert opened(both, "val") == 16


def test_packing_by_a_label_set(tmp_path):
    source = folder(tmp_path / "train", [IMAGENET[3], IMAGENET[999]])
    pack(open_dataset(source), tmp_path / "out", PackOptions(label_set="imagenet-1k"))
    dataset = open_dataset(str(tmp_path / "out"))
    assert {dataset.label(0, i) for i in range(8)} == {3, 999}
    assert tuple(dataset.classes) == IMAGENET
    with pytest.raises(UserError, match="numbers its classes otherwise .* than --label-set imagenet-12k"):
        pack(open_dataset(source), tmp_path / "out", PackOptions(split="val", label_set="imagenet-12k"))
    with pytest.raises(UserError, match="'ant' is no class of --label-set imagenet-1k"):
        pack(
            open_dataset(folder(tmp_path / "ants", ["ant"])),
            tmp_path / "out2",
            PackOptions(label_set="imagenet-1k"),
        )


def test_manifests_beside_a_list_of_signed_urls(tmp_path):
    packed(folder(tmp_path / "a", ["ant", "bee"]), tmp_path / "s", "train")

    def read(path):
        if "://" in path:
            raise Refused("signed for one file alone")
        return Path(path).read_bytes()

    urls = ["https://h/x/train-0000.tar?sig=1", "https://h/x/train-0001.tar?sig=2"]
    assert class_names(urls, read) is None
    assert class_names(urls, read, [str(tmp_path / "s" / "list.txt")]).classes == ("ant", "bee")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("_train.manifest.json", '{"split": "train", "cl', "_train.manifest.json: cannot be read"),
        ("_train.manifest.json", "[]", "_train.manifest.json: cannot be read"),
        (".val.settings.json", "[]", "is not what a packing notes there"),
    ],
)
def test_packing_beside_damaged_notes(tmp_path, file, text, message):
    source = folder(tmp_path / "a", ["ant", "bee"])
    out = tmp_path / "out"
    packed(source, out, "train")
    (out / file).write_text(text)
    with pytest.raises(UserError, match=message):
        packed(source, out, "val")


def test_a_list_of_numbers_beside_a_split_whose_classes_are_called_by_numbers(tmp_path):
    source = folder(tmp_path / "a", ["1", "2", "10"])
    packed(source, tmp_path / "out", "train")
    (tmp_path / "list.txt").write_text("a/1/10.jpg 1\na/2/20.jpg 2\n")
    with pytest.raises(UserError, match="called 1, 2, 10, which are not their numbers"):
        pack(open_source(str(tmp_path / "list.txt")), tmp_path / "out", PackOptions(split="val"))
