"""Segmentation's loaders: the order, the places and the bad samples are classification's, the sizes their own."""

from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_scenes import COLOURS, recipe, write_scene, write_set

from dattrain.config.schema import Config
from dattrain.data import factory
from dattrain.data.annotations.semantic import VOID
from dattrain.data.classes import Classes
from dattrain.data.dense_batch import SegmentationBatch
from dattrain.data.dense_factory import eval_loader, largest, train_loader
from dattrain.data.loader import DevicePrefetcher
from dattrain.data.prepare.pack import pack
from dattrain.data.prepare.write_shard import PackOptions
from dattrain.data.source.dataset import open_dataset
from dattrain.errors import ConfigError, UserError

CPU = torch.device("cpu")
SAMPLES = 21
NAMES = tuple(f"thing{k}" for k in range(1, 7))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("scenes"), SAMPLES)


def read(cfg: Config, *, rank=0, world=1, seen=0, batches: int) -> list[SegmentationBatch]:
    loader = train_loader(cfg, rank=rank, world=world, samples_seen=seen, device=CPU)
    try:
        return list(itertools.islice(loader, batches))
    finally:
        loader.close()


def run_of(cfg: Config, *, world=1, seen=0, updates: int) -> list[SegmentationBatch]:
    """Micro-batches of all ranks, update by update, in the order of slots."""
    per_rank = cfg.train.global_batch // world // cfg.train.micro_batch
    ranks = [read(cfg, rank=r, world=world, seen=seen, batches=updates * per_rank) for r in range(world)]
    return [
        batch
        for update in range(updates)
        for batches in ranks
        for batch in batches[update * per_rank : (update + 1) * per_rank]
    ]


def assert_same(a: list[SegmentationBatch], b: list[SegmentationBatch]) -> None:
    assert [(x.keys, x.bad) for x in a] == [(x.keys, x.bad) for x in b]
    for x, y in zip(a, b):
        for name in ("images", "maps", "sizes", "weight", "position"):
            assert torch.equal(getattr(x, name), getattr(y, name)), name


@pytest.mark.parametrize("crop", [32, None])
def test_every_world_sees_the_same_and_resuming_is_arithmetic(folder, crop):
    """21 samples in batches of 12, over more than two epochs; whole images have sizes of their own."""
    cfg = recipe(folder, geometry={"crop": crop})
    whole = run_of(cfg, updates=5)
    assert_same(whole, run_of(cfg, world=3, updates=5))
    for world, update in ((1, 1), (2, 3), (6, 4)):
        assert_same(whole[6 * update :], run_of(cfg, world=world, seen=12 * update, updates=5 - update))
    keys = [key for batch in whole for key in batch.keys]
    positions = [p for batch in whole for p in batch.position.tolist()]
    epoch = {key for key, position in zip(keys, positions) if position < SAMPLES}
    assert len(epoch) == SAMPLES and sorted(positions) == list(range(60))


@pytest.mark.parametrize("crop", [32, None])
def test_workers_give_what_one_process_gives(folder, crop):
    cfg = recipe(folder, geometry={"crop": crop})
    alone = read(cfg, batches=12)
    assert_same(alone, read(recipe(folder, geometry={"crop": crop}, data={"workers": 2}), batches=12))
    # Lying and standing images together may need more room than a worker's slots have.
    height, width = largest(cfg.geometry)
    assert (height, width) == ((32, 32) if crop else (96, 192))
    assert any(b.maps[0].numel() > height * width for b in alone) == (crop is None)


def test_a_crop_does_not_know_its_micro_batch(folder):
    small = read(recipe(folder, train={"global_batch": 12, "micro_batch": 1}), batches=24)
    large = read(recipe(folder, train={"global_batch": 12, "micro_batch": 6}), batches=4)
    for name in ("images", "maps", "sizes", "position"):
        assert torch.equal(
            torch.cat([getattr(b, name) for b in small]), torch.cat([getattr(b, name) for b in large])
        )


def test_whole_images_are_padded_to_the_largest_of_their_micro_batch(folder):
    cfg = recipe(folder, geometry={"crop": None, "pad_to": 8, "distortion": False}, train={"micro_batch": 3})
    shapes = set()
    for batch in read(cfg, batches=8):
        height, width = batch.sizes.amax(0).tolist()
        assert batch.images.shape == (3, 3, -(-height // 8) * 8, -(-width // 8) * 8)
        assert batch.maps.shape == (3, *batch.images.shape[2:])
        shapes.add(batch.images.shape)
        for image, classes, (h, w) in zip(batch.images, batch.maps, batch.sizes.tolist()):
            inside = torch.zeros(classes.shape, dtype=torch.bool)
            inside[:h, :w] = True
            assert not image[:, ~inside].any() and (classes[~inside] == VOID).all()
            assert image[:, inside].any() and (classes[inside] != VOID).any()
    assert len(shapes) > 1


def test_a_crop_larger_than_the_image_is_padded_and_void(tmp_path, caplog):
    names = write_set(tmp_path, 12)
    read(recipe(names, geometry={"crop": 96}), batches=1)
    assert "geometry.crop" not in caplog.text
    cfg = recipe(names, geometry={"crop": 128, "scale": (0.5, 0.5), "distortion": False})
    batches = read(cfg, batches=6)
    assert (
        "geometry.crop=128 is larger than any resized image, whose longer side is at most 48" in caplog.text
    )
    for batch in batches:
        assert batch.images.shape == (2, 3, 128, 128)
        for image, classes, (h, w) in zip(batch.images, batch.maps, batch.sizes.tolist()):
            assert max(h, w) <= 48 and not image[:, h:].any() and not image[:, :, w:].any()
            assert (classes[h:] == VOID).all() and (classes[:, w:] == VOID).all()


def test_evaluation_takes_each_image_once_as_it_is(folder):
    places = []
    for rank in range(4):
        loader = eval_loader(
            recipe(folder, data={"workers": 1 if rank == 1 else 0}),
            Classes(6, NAMES),
            rank=rank,
            world=4,
            device=CPU,
        )
        batches = list(loader)
        assert len(batches) == len(loader) == 6
        for batch in batches:
            places += batch.position.tolist()
            if len(batch):
                own = Path(folder, batch.keys[0].split(":")[1])
                image = np.asarray(Image.open(own))
                numbers = np.asarray(Image.open(str(own).replace("images", "annotations")))
                np.testing.assert_array_equal(batch.images[0].permute(1, 2, 0), image)
                np.testing.assert_array_equal(batch.maps[0], numbers - np.uint8(1))
                assert batch.sizes.tolist() == [list(numbers.shape)]
            else:
                assert batch.images.shape[:2] == (0, 3) and min(batch.images.shape[2:]) >= 32
                assert batch.maps.shape == (0, *batch.images.shape[2:]) and batch.sizes.shape == (0, 2)
        assert sum(map(len, batches)) == (6 if rank == 0 else 5)
        loader.close()
    assert sorted(places) == list(range(SAMPLES))


def test_classes_are_asked_for_by_name(folder):
    """A network that knows the set's classes in another order gets them in its own."""
    names = (*reversed(NAMES), "more")
    loaders = [
        eval_loader(recipe(folder, classes=len(own)), Classes(len(own), own), rank=0, world=1, device=CPU)
        for own in (NAMES, names)
    ]
    for a, b in zip(*loaders):
        labelled = a.maps != VOID
        assert torch.equal(b.maps[labelled], 5 - a.maps[labelled]) and (b.maps[~labelled] == VOID).all()
    with pytest.raises(UserError, match="is no class of"):
        eval_loader(recipe(folder), Classes(6, (*NAMES[1:], "other")), rank=0, world=1, device=CPU)


def test_packed_shards_and_objects_are_served_like_a_folder(folder, tmp_path):
    pack(open_dataset(str(folder)), tmp_path / "packed", PackOptions(per_shard=8, check=False))

    def by_name(spec: Path, names: tuple[str, ...]) -> dict[str, SegmentationBatch]:
        loader = eval_loader(
            recipe(spec, classes=len(names)), Classes(len(names), names), rank=0, world=1, device=CPU
        )
        found = {Path(batch.keys[0].split(":")[1]).stem: batch for batch in loader}
        loader.close()
        return found

    def content(found: dict[str, SegmentationBatch]) -> set[tuple[bytes, bytes]]:
        return {(batch.images.numpy().tobytes(), batch.maps.numpy().tobytes()) for batch in found.values()}

    # Packing gives samples new names.
    own, packed = by_name(folder, NAMES), by_name(tmp_path / "packed", NAMES)
    assert len(own) == SAMPLES and content(own) == content(packed)

    size = {"width": 50, "height": 40}
    box = {"category_id": 7, "bbox": [10, 5, 20, 30], "area": 600, "iscrowd": 0, "id": 3, "image_id": 9}
    box["segmentation"] = [[10, 5, 30, 5, 30, 35, 10, 35]]
    listed = {
        "images": [{"id": 9, "file_name": "a.png", **size}, {"id": 12, "file_name": "b.png", **size}],
        "annotations": [box],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
    }
    for name in ("a", "b"):
        Image.new("RGB", (50, 40), (9, 99, 199)).save(tmp_path / f"{name}.png")
    (tmp_path / "set.json").write_text(json.dumps(listed))
    # The network has a class more than the set, and its own order.
    names = ("dog", "background", "bird", "cat")
    objects = by_name(tmp_path / "set.json", names)
    want = torch.full((1, 40, 50), 1, dtype=torch.uint8)
    assert torch.equal(objects["b"].maps, want)
    want[:, 5:35, 10:30] = 3
    assert torch.equal(objects["a"].maps, want)
    cfg = recipe(tmp_path / "set.json", classes=3, train={"global_batch": 2})
    (batch,) = read(cfg, batches=1)
    assert batch.maps.shape == (2, 32, 32) and {0} < set(batch.maps.unique().tolist()) <= {0, 1, 2, VOID}


# --- what is wrong with the data -------------------------------------------------------------------------------------


def _damage(root: Path, how: str) -> str:
    """Spoil sample 004 of a set; returns what the message must say."""
    image, numbers = (root / kind / "training" / "004.png" for kind in ("images", "annotations"))
    own = np.array(Image.open(numbers))
    if how == "class":
        own[3, 5] = 8
        write_scene(root, "004", np.minimum(own, 7))
        Image.fromarray(own).save(numbers)
        return r"has 8 at x=5, y=3; by the objectInfo150.txt of its set"
    if how == "size":
        Image.fromarray(own[:-1]).save(numbers)
        return rf"{own.shape[1]} x {own.shape[0] - 1} pixels.*{own.shape[1]} x {own.shape[0]};"
    if how == "missing":
        numbers.unlink()
        return ""  # it is known, and told, when the folder is opened
    if how == "map":
        numbers.write_bytes(numbers.read_bytes()[:60])
        return r"its map"
    if how == "colours":
        Image.fromarray(COLOURS[np.minimum(own, 7)]).save(numbers)
        return r"its map holds RGB colours"
    image.write_bytes(b"this is no image")
    return r"not an image"


@pytest.mark.parametrize("how", ["class", "size", "missing", "map", "colours", "image"])
def test_a_bad_sample_is_an_error_that_names_it_or_is_skipped_and_named(tmp_path, how):
    clean = read(recipe(write_set(tmp_path / "clean", 12)), batches=6)
    folder = write_set(tmp_path / "set", 12)
    says = _damage(tmp_path / "set", how)
    with pytest.raises(UserError, match=rf"004\.png.*{says}.*data.on_bad=skip"):
        read(recipe(folder), batches=6)
    loader = train_loader(
        recipe(folder, data={"on_bad": "skip"}), rank=0, world=1, samples_seen=0, device=CPU
    )
    dirty = list(itertools.islice(loader, 6))
    assert [b.keys for b in clean] == [b.keys for b in dirty]
    for a, b in zip(clean, dirty):
        hit = torch.tensor([key.endswith("004.png") for key in b.keys])
        assert torch.equal(b.weight, (~hit).float())
        assert torch.equal(a.images[~hit], b.images[~hit]) and torch.equal(a.maps[~hit], b.maps[~hit])
        assert not b.images[hit].any() and (b.maps[hit] == VOID).all()
    assert loader.skipped.count == 1
    ((key, reason),) = loader.skipped.samples.items()
    assert key.endswith("004.png") and "004" in reason
    evaluated = list(
        eval_loader(recipe(folder, data={"on_bad": "skip"}), Classes(6, NAMES), rank=0, world=1, device=CPU)
    )
    (bad,) = (batch for batch in evaluated if batch.bad)
    assert bad.weight.tolist() == [0] and (bad.maps == VOID).all() and bad.images.shape == (1, 3, 32, 32)


def test_nothing_but_void_is_refused_at_the_start(tmp_path):
    folder = write_set(tmp_path, 14)
    rng = np.random.default_rng(1)
    for i in range(14):
        write_scene(tmp_path, f"{i:03d}", np.zeros(rng.integers(40, 60, 2), np.uint8))
    with pytest.raises(UserError, match=r"data.train=.*: no pixel of its 14 samples has a class"):
        read(recipe(folder), batches=1)
    with pytest.raises(UserError, match=r"data.val=.*: no pixel of its 14 samples has a class"):
        eval_loader(recipe(folder), Classes(6, NAMES), rank=0, world=1, device=CPU)
    write_scene(tmp_path, "004", np.full((40, 40), 1, np.uint8))
    # One that has a class is enough, wherever it comes: batches of void alone are served.
    assert any((batch.maps == VOID).all() for batch in read(recipe(folder), batches=6))
    for place in (tmp_path / "annotations/training").glob("*.png"):
        place.write_bytes(b"no map")
    with pytest.raises(
        UserError, match=r"no pixel of its 14 .*bad samples, the first of them: .*its map is no PNG"
    ):
        read(recipe(folder, data={"on_bad": "skip"}), batches=1)


def test_objects_without_masks_are_refused_at_the_start_or_skipped(tmp_path):
    listed = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(2)],
        "annotations": [
            {"id": 5, "image_id": 0, "category_id": 7, "bbox": [0, 0, 20, 30], "segmentation": []}
        ],
        "categories": [{"id": 7, "name": "cat"}],
    }
    for i in range(2):
        Image.new("RGB", (50, 40)).save(tmp_path / f"{i}.png")
    spec = tmp_path / "set.json"
    spec.write_text(json.dumps(listed))
    with pytest.raises(
        UserError,
        match=r"data.train: .*set.json: 1 object with a box and no mask: annotation 5 of image 0; task",
    ):
        read(recipe(spec, classes=2, train={"global_batch": 2}), batches=1)
    (batch,) = read(recipe(spec, classes=2, train={"global_batch": 2}, data={"on_bad": "skip"}), batches=1)
    assert sorted(batch.weight.tolist()) == [0, 1] and "no mask" in batch.bad[0][1]


def test_a_task_refuses_the_sets_of_another(folder, make_shards):
    with pytest.raises(UserError, match=r"data.train=.*task.kind=segmentation needs annotations"):
        read(recipe(make_shards()), batches=1)
    classify = Config.model_validate(
        {"model": {"num_classes": 6}, "data": {"train": str(folder), "workers": 0}}
    )
    with pytest.raises(UserError, match=r"data.train=.*task.kind=classification needs images with a class"):
        factory.train_loader(classify, rank=0, world=1, samples_seen=0, device=CPU, img_size=32)


def test_settings_that_do_not_fit_the_set(folder):
    with pytest.raises(ConfigError, match="has 21 samples, fewer than one train.global_batch=24"):
        read(recipe(folder, train={"global_batch": 24}), batches=1)
    with pytest.raises(ConfigError, match=r"has 6 classes .*model.num_classes=5"):
        read(recipe(folder, classes=5), batches=1)
    with pytest.raises(ConfigError, match="data.val is not set"):
        eval_loader(recipe(folder, data={"val": None}), Classes(6, NAMES), rank=0, world=1, device=CPU)


# --- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_survives_pickling_and_moves_as_a_whole(folder):
    (batch,) = read(recipe(folder, geometry={"crop": None}), batches=1)
    assert_same([batch], [pickle.loads(pickle.dumps(batch))])
    moved = DevicePrefetcher(CPU)(batch)
    assert_same([batch], [moved])
    meta = batch.to(torch.device("meta"))
    on_device = {
        name for name, value in vars(meta).items() if isinstance(value, torch.Tensor) and value.is_meta
    }
    assert on_device == {"images", "maps", "weight"}
    assert all(tensor.is_meta for tensor in meta.device_tensors) and len(meta.device_tensors) == 3


def test_loading_moves_no_global_generator(folder):
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    read(recipe(folder), batches=3)
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])
