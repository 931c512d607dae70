"""Detection's loaders: the order, the places and the bad samples are classification's, boxes and masks their own."""

from __future__ import annotations

import itertools
import json
import logging
import pickle
from pathlib import Path

import numpy as np
import objects
import pytest
import torch
from PIL import Image

from dattrain.config.load import loads
from dattrain.config.schema import Config
from dattrain.data import detection_factory
from dattrain.data.annotations import segmentations
from dattrain.data.classes import Classes
from dattrain.data.dense_factory import largest
from dattrain.data.detection_batch import GRID, DetectionBatch
from dattrain.data.detection_factory import eval_loader, train_loader
from dattrain.data.prepare.pack import pack
from dattrain.data.prepare.write_shard import PackOptions
from dattrain.data.source.dataset import open_dataset
from dattrain.errors import ConfigError, UserError

CPU = torch.device("cpu")
SAMPLES = 21
NAMES = tuple(objects.CATEGORIES.values())
EVERYTHING = {
    "precrop": 0.5, "precrop_short_sides": [40, 60], "precrop_sides": [32, 50], "copy_paste": 0.5, "distortion": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("objects")
    objects.write(root, train=SAMPLES, val=SAMPLES)
    return root


def recipe(root: Path, /, *, head: str = "mask_rcnn", **sections: dict) -> Config:
    base = objects.recipe_of(head)
    base["data"] |= {"train": f"{root}/train.json", "val": f"{root}/val.json", "window": 1}
    base["train"] |= {"global_batch": 12}
    return Config.model_validate(
        {key: {**base[key], **sections.get(key, {})} if isinstance(base[key], dict) else base[key] for key in base}
    )  # fmt: skip


def read(cfg: Config, *, rank=0, world=1, seen=0, batches: int) -> list[DetectionBatch]:
    loader = train_loader(cfg, rank=rank, world=world, samples_seen=seen, device=CPU)
    try:
        return list(itertools.islice(loader, batches))
    finally:
        loader.close()


def run_of(cfg: Config, *, world=1, seen=0, updates: int) -> list[DetectionBatch]:
    """Micro-batches of all ranks, update by update, in the order of slots."""
    per_rank = cfg.train.global_batch // world // cfg.train.micro_batch
    ranks = [read(cfg, rank=r, world=world, seen=seen, batches=updates * per_rank) for r in range(world)]
    return [
        batch
        for update in range(updates)
        for batches in ranks
        for batch in batches[update * per_rank : (update + 1) * per_rank]
    ]


def evaluated(cfg: Config, names: tuple[str, ...] = NAMES, *, rank=0, world=1) -> list[DetectionBatch]:
    loader = eval_loader(cfg, Classes(len(names), names), rank=rank, world=world, device=CPU)
    assert len(loader) == -(-SAMPLES // world)
    batches = list(loader)
    loader.close()
    return batches


def assert_same(a: list[DetectionBatch], b: list[DetectionBatch]) -> None:
    assert [(x.keys, x.bad, x.counts, x.emptied) for x in a] == [
        (x.keys, x.bad, x.counts, x.emptied) for x in b
    ]
    for x, y in zip(a, b):
        for name in ("images", "sizes", "boxes", "labels", "masks", "weight", "position"):
            assert torch.equal(getattr(x, name), getattr(y, name)), name


def samples(batches: list[DetectionBatch]) -> dict[int, tuple[torch.Tensor, dict[str, torch.Tensor] | None]]:
    """Image without padding, and targets, by position."""
    return {
        position: (image[:, :height, :width], targets)
        for batch in batches
        for position, image, (height, width), targets in zip(
            batch.position.tolist(), batch.images, batch.sizes.tolist(), batch.targets()
        )
    }


@pytest.mark.parametrize("geometry", [{}, EVERYTHING], ids=["plain", "everything"])
def test_every_world_sees_the_same_and_resuming_is_arithmetic(folder, geometry):
    """21 samples in batches of 12, over more than two epochs."""
    cfg = recipe(folder, geometry=geometry)
    whole = run_of(cfg, updates=5)
    assert_same(whole, run_of(cfg, world=3, updates=5))
    for world, update in ((2, 3), (6, 4)):
        assert_same(whole[6 * update :], run_of(cfg, world=world, seen=12 * update, updates=5 - update))
    keys = [key for batch in whole for key in batch.keys]
    positions = [p for batch in whole for p in batch.position.tolist()]
    epoch = {key for key, position in zip(keys, positions) if position < SAMPLES}
    assert len(epoch) == SAMPLES and sorted(positions) == list(range(60))
    for update in range(5):
        own = [p for batch in whole[6 * update : 6 * update + 6] for p in batch.position.tolist()]
        assert sorted(own) == list(range(12 * update, 12 * update + 12))


def test_a_sample_does_not_know_its_micro_batch(folder):
    """Neither what is drawn for it, nor whose objects are pasted into it."""
    geometry = {**EVERYTHING, "copy_paste": 1.0}
    for one, other in (
        (recipe(folder, geometry=geometry), recipe(folder, geometry=geometry, train={"micro_batch": 6})),
        (recipe(folder, geometry=geometry), recipe(folder, geometry={**geometry, "group_aspect": False})),
    ):
        a, b = (samples(run_of(cfg, updates=2)) for cfg in (one, other))
        assert a.keys() == b.keys() and len(a) == 24
        for position, (image, targets) in a.items():
            assert torch.equal(image, b[position][0])
            for name in ("boxes", "labels", "masks"):
                assert torch.equal(targets[name], b[position][1][name])
    plain = samples(run_of(recipe(folder, geometry={**geometry, "copy_paste": 0.0}), updates=2))
    more = sum(len(a[p][1]["labels"]) > len(plain[p][1]["labels"]) for p in a)
    assert more > 6


@pytest.mark.parametrize("head", ["mask_rcnn", "retinanet"])
def test_workers_give_what_one_process_gives(folder, head):
    alone = read(recipe(folder, head=head, geometry=EVERYTHING), batches=12)
    cfg = recipe(folder, head=head, geometry=EVERYTHING, data={"workers": 2})
    assert_same(alone, read(cfg, batches=12))
    assert {b.masks.shape[1:] for b in alone} == {(GRID, GRID) if head == "mask_rcnn" else (0, 0)}


def test_a_batch_that_is_larger_than_a_slot_goes_through_memory_of_its_own(folder, monkeypatch):
    """Images of both orientations together, or many objects."""
    geometry = {"short_sides": [], "group_aspect": False}
    cfg = recipe(folder, geometry=geometry)
    alone = read(cfg, batches=6)
    assert largest(cfg.geometry) == (64, 96)
    assert any(b.images[0, 0].numel() > 64 * 96 for b in alone)
    monkeypatch.setattr(detection_factory, "_OBJECTS", 1)
    workers = recipe(folder, geometry=geometry, data={"workers": 1})
    assert_same(alone, read(workers, batches=6))


def test_a_micro_batch_below_the_recipes_is_told(folder, caplog):
    train_loader(recipe(folder), rank=0, world=1, samples_seen=0, device=CPU).close()
    assert not [line for line in caplog.messages if "micro_batch" in line]
    train_loader(recipe(folder), rank=0, world=12, samples_seen=0, device=CPU).close()
    (told,) = [line for line in caplog.messages if "micro_batch" in line]
    assert "train.micro_batch=2 on 12 devices with train.global_batch=12 is 1" in told and "6 devices" in told


def test_lying_and_standing_images_are_apart(folder, caplog):
    caplog.set_level(logging.INFO)
    cfg = recipe(folder, geometry={"short_sides": []})
    kinds = [len({h > w for h, w in batch.sizes.tolist()}) for batch in run_of(cfg, updates=4)]
    for update in range(4):
        assert sum(kind > 1 for kind in kinds[6 * update : 6 * update + 6]) <= 1
    assert "without geometry.group_aspect (by the first 42 updates)" in caplog.text
    mixed = run_of(recipe(folder, geometry={"short_sides": [], "group_aspect": False}), updates=4)
    assert sum(len({h > w for h, w in batch.sizes.tolist()}) > 1 for batch in mixed) > 4
    # Crops of one size have nothing to gain, and stay in the order of the lanes.
    crops = {"crop": 48, "scale": [0.5, 2.0]}
    some = [batch.position.tolist() for batch in run_of(recipe(folder, geometry=crops), updates=2)]
    assert some == [b.position.tolist() for b in mixed[:12]]


def test_images_are_padded_to_the_largest_of_their_micro_batch(folder):
    shapes = set()
    for batch in read(recipe(folder, geometry={"pad_to": 8}, train={"micro_batch": 3}), batches=8):
        height, width = batch.sizes.amax(0).tolist()
        assert batch.images.shape == (3, 3, -(-height // 8) * 8, -(-width // 8) * 8)
        shapes.add(batch.images.shape)
        for image, (h, w), targets in zip(batch.images, batch.sizes.tolist(), batch.targets()):
            assert not image[:, h:].any() and not image[:, :, w:].any() and image[:, :h, :w].any()
            boxes = targets["boxes"]
            assert (boxes[:, 2:] - boxes[:, :2] >= 1).all() and (boxes >= 0).all()
            assert (boxes <= torch.tensor([w, h, w, h])).all()
    assert len(shapes) > 1
    # Of large-scale jitter all have the size of the crop, and padding where the image is smaller.
    jitter = {"short_side": 96, "short_sides": [], "long_side": 96, "scale": [0.1, 2.0], "crop": 96}
    batches = read(recipe(folder, geometry=jitter), batches=12)
    assert {batch.images.shape for batch in batches} == {(2, 3, 96, 96)}
    sizes = torch.cat([batch.sizes for batch in batches])
    assert sizes.min() < 30 and sizes.max() == 96


def test_what_a_crop_leaves_none_of_is_counted(folder):
    geometry = {"short_sides": [], "scale": [3.0, 3.0], "crop": 32}
    batches = read(recipe(folder, geometry=geometry), batches=12)
    there = {Path(key).name: one for key, one in _truth(folder / "train.json").items()}
    empty = [
        name
        for batch in batches
        for count, key in zip(batch.counts, batch.keys)
        if not count and (name := key.split(":")[1]) in there
    ]
    with_objects = [name for name in empty if there[name]]
    assert sum(batch.emptied for batch in batches) == len(with_objects) > 2 and len(empty) > len(with_objects)


def _truth(path: Path) -> dict[str, list[dict]]:
    """Objects that are no crowds, by file name."""
    content = json.loads(path.read_text())
    return {
        image["file_name"]: [
            one for one in content["annotations"] if one["image_id"] == image["id"] and not one["iscrowd"]
        ]
        for image in content["images"]
    }


def test_targets_are_the_objects_of_the_file(folder):
    """At its stored size an image has the boxes, classes and masks of the JSON, but for crowds."""
    geometry = {"short_side": 999, "short_sides": [], "long_side": 999, "group_aspect": False}
    cfg = recipe(folder, geometry=geometry, augment={"hflip": 0.0})
    truth, ids = _truth(folder / "train.json"), list(objects.CATEGORIES)
    seen = 0
    for batch in read(cfg, batches=10):
        for key, (height, _), targets in zip(batch.keys, batch.sizes.tolist(), batch.targets()):
            own = truth[key.split(":")[1]]
            stored = Image.open(folder / "train" / key.split(":")[1])
            scale = height / stored.height
            assert targets["labels"].tolist() == [ids.index(one["category_id"]) for one in own]
            for one, box, grid in zip(own, targets["boxes"], targets["masks"]):
                x, y, w, h = one["bbox"]
                assert (box / scale).tolist() == pytest.approx([x, y, x + w, y + h], rel=2e-2)
                assert grid.float().mean() / 255 == pytest.approx(one["area"] / (w * h), abs=2e-2)
                seen += 1
    assert seen > 20


@pytest.mark.parametrize("head", ["mask_rcnn", "retinanet"])
def test_evaluation_takes_each_image_once_as_it_is(folder, head):
    places, ids = [], []
    for rank in range(4):
        cfg = recipe(folder, head=head, data={"workers": 1 if rank == 1 else 0})
        for batch in evaluated(cfg, rank=rank, world=4):
            places += batch.position.tolist()
            ids += batch.image_ids
            assert batch.boxes.shape == (0, 4) and batch.masks.shape == (0, 0, 0) and not sum(batch.counts)
            assert len(batch) == len(batch.truth) == len(batch.image_ids) == len(batch.counts)
            if not len(batch):
                assert batch.images.shape == (0, 3, 32, 32) and batch.sizes.shape == (0, 2)
                continue
            name = batch.keys[0].split(":")[1]
            image = np.asarray(Image.open(folder / "val" / name))
            np.testing.assert_array_equal(batch.images[0].permute(1, 2, 0), image)
            assert batch.sizes.tolist() == [list(image.shape[:2])]
            content = json.loads((folder / "val.json").read_text())
            own = [one for one in content["annotations"] if one["image_id"] == batch.image_ids[0]]
            (truth,) = batch.truth
            assert f"{batch.image_ids[0]}" == f"{int(name[:4])}"
            assert truth.boxes.tolist() == [one["bbox"] for one in own]
            assert truth.crowd.tolist() == [bool(one["iscrowd"]) for one in own]
            known = list(objects.CATEGORIES)
            assert truth.classes.tolist() == [known.index(one["category_id"]) for one in own]
            for one, mask in zip(own, truth.segmentations):
                assert segmentations.mask(mask, truth.size, "").sum() == one["area"]
    assert sorted(places) == list(range(SAMPLES)) and len(set(ids)) == SAMPLES
    assert any(one["iscrowd"] for one in content["annotations"])


def test_classes_are_asked_for_by_name(folder):
    """A network that knows the set's classes in another order gets them in its own."""
    names = ("disc", "more", "bar", "box")
    table = np.array([names.index(name) for name in NAMES])
    cfg = recipe(folder, model={"num_classes": 4})
    for a, b in zip(evaluated(recipe(folder)), evaluated(cfg, names)):
        assert b.truth[0].classes.tolist() == table[a.truth[0].classes].tolist()
    with pytest.raises(UserError, match="is no class of"):
        evaluated(recipe(folder), ("disc", "bar", "other"))


def test_packed_shards_are_served_like_the_file(folder, tmp_path):
    pack(open_dataset(f"{folder}/val.json"), tmp_path, PackOptions(per_shard=8, check=False))
    packed = {batch.image_ids[0]: batch for batch in evaluated(recipe(folder, data={"val": str(tmp_path)}))}
    own = evaluated(recipe(folder))
    assert len(packed) == len(own)
    for batch in own:
        other = packed[batch.image_ids[0]]
        assert torch.equal(batch.images, other.images)
        for name in ("boxes", "classes", "crowd", "area"):
            np.testing.assert_array_equal(getattr(batch.truth[0], name), getattr(other.truth[0], name))
    cfg = recipe(folder, data={"train": str(tmp_path)}, geometry=EVERYTHING)
    batches = run_of(cfg, updates=2)
    assert_same(batches, run_of(cfg, world=2, updates=2))
    # The index says how large the images are.
    kinds = [len({h > w for h, w in batch.sizes.tolist()}) for batch in batches]
    assert sum(kind > 1 for kind in kinds[:6]) <= 1 and sum(kind > 1 for kind in kinds[6:]) <= 1


# --- what is wrong with the data -------------------------------------------------------------------------------------


def edited(root: Path, folder: Path, change) -> Path:
    """A copy of a set whose JSON ``change`` has edited."""
    for part in ("train", "val"):
        (root / part).symlink_to(folder / part)
        content = json.loads((folder / f"{part}.json").read_text())
        change(content)
        (root / f"{part}.json").write_text(json.dumps(content))
    return root


def test_a_bad_sample_is_an_error_that_names_it_or_is_skipped_and_named(tmp_path):
    objects.write(tmp_path, train=12, val=12)
    geometry = {**EVERYTHING, "copy_paste": 1.0}
    clean = read(recipe(tmp_path, geometry=geometry), batches=6)
    (tmp_path / "train" / "1004.png").write_bytes(b"this is no image")
    with pytest.raises(UserError, match=r"1004\.png.*not an image.*data.on_bad=skip"):
        read(recipe(tmp_path, geometry=geometry), batches=6)
    cfg = recipe(tmp_path, geometry=geometry, data={"on_bad": "skip"})
    loader = train_loader(cfg, rank=0, world=1, samples_seen=0, device=CPU)
    dirty = list(itertools.islice(loader, 6))
    assert [b.keys for b in clean] == [b.keys for b in dirty]
    before, after = samples(clean), samples(dirty)
    same = 0
    for batch in dirty:
        hit = [key.endswith("1004.png") for key in batch.keys]
        assert torch.equal(batch.weight, 1 - torch.tensor(hit).float())
        assert [t is None for t in batch.targets()] == hit
        for i in np.flatnonzero(hit):
            assert not batch.images[i].any() and batch.counts[i] == 0 and batch.sizes[i].tolist() == [32, 32]
        for position in (p for p, is_hit in zip(batch.position.tolist(), hit) if not is_hit):
            same += torch.equal(before[position][0], after[position][0])
    # Who would have got its objects gets none; it is counted once, where it is trained on.
    assert same >= 9
    assert loader.skipped.count == 1 and all("1004.png" in key for key in loader.skipped.samples)
    (tmp_path / "val" / "1015.png").write_bytes(b"this is no image")
    loader = eval_loader(cfg, Classes(3, NAMES), rank=0, world=1, device=CPU)
    (bad,) = (batch for batch in loader if batch.bad)
    assert bad.weight.tolist() == [0] and bad.images.shape == (1, 3, 32, 32)
    assert len(bad.truth) == 1 and not len(bad.truth[0]) and bad.image_ids == ("val.json:1015.png",)


def _boxes_alone(content: dict) -> None:
    del content["annotations"][5]["segmentation"]


def test_objects_without_masks_are_refused_where_masks_are_needed(folder, tmp_path):
    root = edited(tmp_path, folder, _boxes_alone)
    with pytest.raises(UserError, match=r"data.train: .*1 object with a box and no mask: annotation 105"):
        read(recipe(root), batches=1)
    assert len(read(recipe(root, head="retinanet"), batches=30)) == 30
    pasting = {"copy_paste": 0.5}
    with pytest.raises(UserError, match=r"geometry.copy_paste=0.5 pastes .* 1 object with .*annotation 105"):
        read(recipe(root, head="retinanet", geometry=pasting), batches=1)
    for head in ("mask_rcnn", "retinanet"):
        cfg = recipe(root, head=head, geometry=pasting, data={"on_bad": "skip"})
        skipped = [reason for batch in read(cfg, batches=12) for _, reason in batch.bad]
        assert skipped and all("has a box and no mask" in reason for reason in skipped)


def _crowds(content: dict) -> None:
    for one in content["annotations"]:
        one["iscrowd"] = 1


def test_a_set_without_objects_is_refused_at_the_start(folder, tmp_path):
    root = edited(tmp_path, folder, _crowds)
    with pytest.raises(UserError, match=r"data.train=.*: none of its 21 samples has an object that is no c"):
        read(recipe(root), batches=1)
    with pytest.raises(
        UserError, match=r"data.val=.*: none of its 21 samples has an object that is no crowd"
    ):
        evaluated(recipe(root))


def test_settings_that_do_not_fit(folder):
    with pytest.raises(ConfigError, match="has 21 samples, fewer than one train.global_batch=24"):
        read(recipe(folder, train={"global_batch": 24}), batches=1)
    with pytest.raises(ConfigError, match=r"has 3 classes .*model.num_classes=4"):
        read(recipe(folder, model={"num_classes": 4}), batches=1)
    with pytest.raises(ConfigError, match="data.val is not set"):
        evaluated(recipe(folder, data={"val": None}))
    text = json.dumps(recipe(folder).model_dump(mode="json", by_alias=True))
    with pytest.raises(ConfigError, match="data.decoder=dali is not for task.kind=detection.*decoder=cpu"):
        loads(text, ["data.decoder=dali"])
    with pytest.raises(ConfigError, match=r"geometry.copy_paste=0.5 takes objects from another image"):
        loads(text, ["geometry.copy_paste=0.5", "train.global_batch=1"])


# --- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_survives_pickling_and_moves_as_a_whole(folder):
    (batch,) = read(recipe(folder), batches=1)
    assert_same([batch], [pickle.loads(pickle.dumps(batch))])
    meta = batch.to(torch.device("meta"))
    on_device = {
        name for name, value in vars(meta).items() if isinstance(value, torch.Tensor) and value.is_meta
    }
    assert on_device == {"images", "boxes", "labels", "masks", "weight"}
    assert all(tensor.is_meta for tensor in meta.device_tensors) and len(meta.device_tensors) == 5
    (image, *_) = evaluated(recipe(folder))
    again = pickle.loads(pickle.dumps(image))
    assert again.image_ids == image.image_ids and again.truth[0].segmentations == image.truth[0].segmentations


def test_loading_moves_no_global_generator(folder):
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    read(recipe(folder, geometry=EVERYTHING), batches=3)
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])
