"""The screen before a training of own images: short for any number of classes, with what is odd said."""

from pathlib import Path

import pytest

from dattrain.cli import own_images
from dattrain.config import choose
from dattrain.config.choose import Machine
from dattrain.data.prepare.own_images import Own
from dattrain.errors import ConfigError, UserError

CPU = Machine("cpu", 1, 2)


def own(counts, unreadable=()):
    root = Path("/photos")
    train = {name: [f"{name}/{i}.jpg" for i in range(count)] for name, count in counts.items()}
    val = {name: [f"{name}/v.jpg"] for name in counts}
    return Own(root, root, train, val, True, ("a note",), (640, 4000), (480, 3000), unreadable)


def shown(found, *overrides, recipe=None):
    settled = own_images.settle(
        found, Path("/run"), CPU, name="photos", overrides=["model.img_size=32", *overrides], recipe=recipe
    )
    return own_images.screen(found, settled.config, CPU, Path("/run"), Path("photos"), None), settled


def test_a_thousand_classes_are_one_line_with_the_first_and_the_extremes():
    counts = {f"class{i:04d}": 20 for i in range(1000)} | {"class0500": 3, "class0700": 900}
    lines, _ = shown(own(counts))
    (classes,) = [line for line in lines if line.startswith("classes")]
    assert len(lines) < 20 and max(map(len, lines)) < 300
    assert classes == (
        "classes  1000: class0000 20, class0001 20, class0002 20, class0003 20, ...; fewest: class0500 3; most: class0700 900"
    )
    notes = "\n".join(line for line in lines if line.startswith("note"))
    assert "a note" in notes and "300 times the images of the smallest" in notes
    assert "1 class(es) have fewer than 10 images to train on: class0500" in notes


def test_what_will_be_trained_is_what_follows_from_the_settings():
    lines, settled = shown(
        own({"cat": 60, "dog": 68}), "train.global_batch=32", "optim.lr=1e-3", "schedule.epochs=5"
    )
    text = "\n".join(lines)
    assert "128 to train on, 2 to evaluate on (held out: a tenth of each class, seed 0)" in text
    assert "32 (1 device(s), 32 at a time, 1 accumulated); 5 epochs of 4.0 updates, 20 in all" in text
    assert "peak 0.001 after 1 updates" in text
    assert "640 x 480 to 4000 x 3000 px, median shorter side 1740" in text
    assert settled.reasons["optim.lr"] == own_images.ON_COMMAND_LINE and "times the images" not in text
    assert settled.config.data.val == "/run/val.images.json"


def test_a_recipe_stands_but_for_data_and_classes():
    found = own({"cat": 60, "dog": 68})
    _, settled = shown(found, "train.global_batch=32", recipe="in1k_dat_tiny_224")
    config = settled.config
    assert (config.model.name, config.schedule.epochs, config.augment.mixup) == ("dat_tiny", 300, 0.8)
    assert (config.model.num_classes, config.data.labels) == (2, None)
    with pytest.raises(ConfigError, match="/photos has 128 samples, fewer than one train.global_batch=4096"):
        shown(found, recipe="in1k_dat_tiny_224")
    synsets = own({"n01440764": 60, "n01443537": 68})
    labelled = shown(synsets, "train.global_batch=32", recipe="in1k_dat_tiny_224")[1].config
    assert (labelled.model.num_classes, labelled.data.labels) == (1000, "imagenet-1k")


class Weights:
    """As ``pretrained.start_from.Start`` answers ``settle``."""

    def __init__(self, name, **known):
        self.found = choose.Weights("/w.safetensors", name, 224, **known)

    def weights(self, folder, classes):
        return self.found


def test_a_recipe_for_weights_gets_these_and_a_head_for_the_classes():
    found = own({"cat": 60, "dog": 68})

    def tuned(weights, *overrides):
        words = ["train.global_batch=32", *overrides]
        recipe = "in1k_dat_tiny_224_from_22k"
        return own_images.settle(
            found, Path("/run"), CPU, name="x", recipe=recipe, overrides=words, start=weights
        ).config

    config = tuned(Weights("dat_tiny", overrides={"window_size": 7}, shared=1))
    assert (config.init.from_, config.init.head, config.model.overrides) == (
        "/w.safetensors",
        "map",
        {"window_size": 7},
    )
    assert tuned(Weights("dat_tiny")).init.head == "new", "a map of nothing could not be"
    assert config.schedule.epochs == 30 and config.model.num_classes == 2
    with pytest.raises(ConfigError, match="model.name=dat_tiny, but /w.safetensors has weights of dat_base"):
        tuned(Weights("dat_base"))


def test_what_does_not_fit_is_refused_before_anything_is_written():
    with pytest.raises(ConfigError, match="set model.num_classes=2"):
        shown(own({"cat": 60, "dog": 68}), "model.num_classes=3")
    with pytest.raises(UserError, match=r"1 of 3 files .* no readable images: x.jpg \(why\). Remove them"):
        shown(own({"cat": 60, "dog": 68}, ("x.jpg (why)",)))
    assert shown(own({"cat": 60, "dog": 68}, ("x.jpg (why)",)), "data.on_bad=skip")
