"""The recipes of Tables 3 and 4: which there are, what they say of their source, and that their numbers are the published ones."""

import re
from pathlib import Path

import pytest

from dattrain.config.derive import check_source, derive
from dattrain.config.load import load
from dattrain.errors import ConfigError

CONFIGS = Path(__file__).parents[3] / "configs"
IMAGES = 117_266
"""Of COCO's train2017 with an object."""
DROP_PATH = {
    "retinanet": {"dat_tiny": (0, 0.2), "dat_small": (0.1, 0.5), "swin_tiny": (0.1, 0.2), "swin_small": (0.2, 0.2)},
    "mask_rcnn": {"dat_tiny": (0, 0.3), "dat_small": (0.1, 0.5), "swin_tiny": (0.1, 0.2), "swin_small": (0.2, 0.2)},
    "cascade_mask_rcnn": {
        "dat_tiny": (0, 0.1), "dat_small": (None, 0.5), "dat_base": (None, 0.8),
        "swin_tiny": (0, 0.2), "swin_small": (None, 0.2), "swin_base": (None, 0.3),
    },
}  # fmt: skip
"""Of 1x and 3x, None where the paper has no such row (DAT-Detection's files of DAT++, Swin's)."""
ROWS = {
    f"coco_{head}_{backbone}_{schedule}": rate
    for head, backbones in DROP_PATH.items()
    for backbone, rates in backbones.items()
    for schedule, rate in zip(("1x", "3x"), rates)
    if rate is not None
}


def test_there_is_one_for_every_row_of_tables_3_and_4_that_has_windows_or_deformed_attention():
    assert {path.stem for path in (CONFIGS / "coco").glob("*.yaml")} == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_recipe(name):
    config = load(CONFIGS / f"coco/{name}.yaml").config
    assert config.name == name
    assert "Source: " in config.description and "Not run by us" in config.description
    if "dat" in name:
        assert "unverified" in config.description, "the authors published no file for DAT"
    devices, micro = map(int, re.search(r"(\d+) devices x (\d+)", config.description).groups())
    assert micro == config.train.micro_batch
    assert config.model.drop_path == ROWS[name]
    assert (config.model.img_size, config.model.num_classes, config.geometry.crop) == (224, 80, None)
    assert (config.geometry.precrop, min(config.geometry.short_sides), max(config.geometry.short_sides)) == (
        0.5,
        480,
        800,
    )
    found = derive(config, world=devices, samples_per_epoch=IMAGES)
    assert found.accumulation == 1
    assert derive(config, world=devices // 4, samples_per_epoch=IMAGES).accumulation == 4
    assert found.warmup_steps == 500 and found.warmup_lr == pytest.approx(found.peak_lr / 1000)
    epochs, drops = {"1x": (12, (8, 11)), "3x": (36, (27, 33))}[name[-2:]]
    assert found.total_steps == pytest.approx(epochs * found.steps_per_epoch, abs=1)
    assert found.milestones == tuple(round(each * found.steps_per_epoch) for each in drops)
    assert config.schedule.kind == "step" and found.min_lr == 0 and config.optim.clip == 0
    rate = {"dat": 2e-4 if "retinanet" in name else 4e-4, "swin": 1e-4}[name.split("_")[-3]]
    assert (found.peak_lr, config.train.global_batch) == (pytest.approx(rate), 64 if "dat" in name else 16)
    with pytest.raises(ConfigError, match="init.from"):
        check_source(config)


def test_a_smaller_batch_has_the_rate_that_swins_files_have():
    config = load(CONFIGS / "coco/coco_mask_rcnn_dat_tiny_1x.yaml", ["train.global_batch=16"]).config
    assert derive(config, world=8, samples_per_epoch=IMAGES).peak_lr == pytest.approx(1e-4)
