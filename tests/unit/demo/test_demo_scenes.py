"""The demo's scenes: a function of seed and index, whose masks are what is seen of each item, and read back as they were made."""

import numpy as np

from dattrain.data.annotations.semantic import semantic_map
from dattrain.data.decode.images import decode
from dattrain.data.source.dataset import locate, open_dataset
from dattrain.demo import scenes
from dattrain.demo.results import CLASSES

ITEMS = np.random.default_rng(0).integers(0, 256, (6, 28, 28)).astype(np.uint8)
LABELS = np.array([0, 3, 3, 7, 9, 9], dtype=np.uint8)


def test_a_scene_is_a_function_of_seed_and_index_and_its_masks_are_apart():
    found = [scenes.scene(ITEMS, LABELS, 1, index) for index in range(12)]
    assert len({made.image.tobytes() for made in found}) == 12
    assert sum(len(made.labels) for made in found) > 12
    for index, made in enumerate(found):
        assert np.array_equal(made.image, scenes.scene(ITEMS, LABELS, 1, index).image)
        assert made.masks.shape == (len(made.labels), *made.image.shape[:2])
        assert made.masks.sum(0).max(initial=0) <= 1 and set(made.labels) <= set(LABELS.tolist())
    assert not np.array_equal(found[0].image, scenes.scene(ITEMS, LABELS, 2, 0).image)


def test_written_scenes_are_read_back_pixel_for_pixel(tmp_path):
    path = scenes.write(tmp_path / "set", ITEMS, LABELS, CLASSES, seed=1, count=5)
    dataset = open_dataset(str(path))
    assert list(dataset.classes) == ["background", *CLASSES]
    seen = set()
    for item in range(5):
        sample = dataset.read(*locate(dataset, item))
        index = int(sample.key.partition(":")[2].removesuffix(".png"))
        seen.add(index)
        made = scenes.scene(ITEMS, LABELS, 1, index)
        pixels = decode(sample.data).permute(1, 2, 0).numpy()
        assert np.array_equal(pixels, made.image)
        truth = np.zeros(pixels.shape[:2], np.uint8)
        for label, mask in zip(made.labels, made.masks):
            truth[mask] = label + 1
        assert np.array_equal(
            semantic_map(sample.annotation, pixels.shape[:2], dataset.numbers, sample.where), truth
        )
    assert seen == set(range(5))
    dataset.close()
