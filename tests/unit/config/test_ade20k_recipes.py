"""The recipes of Table 5: which there are, what they say of their source, and that their numbers are the published ones."""

import re
from pathlib import Path

import pytest

from dattrain.config.derive import check_source, derive
from dattrain.config.load import load
from dattrain.errors import ConfigError

CONFIGS = Path(__file__).parents[3] / "configs"
RECIPES = sorted((CONFIGS / "ade20k").glob("*.yaml"))
IMAGES = 20_210
DROP_PATH = {
    "upernet_dat": (0.3, 0.5, 0.7),
    "semantic_fpn_dat": (0.4, 0.4, 0.7),
    "upernet_swin": (0.3, 0.3, 0.3),
}
"""Of tiny, small and base (DAT-Segmentation's files, Swin's)."""


def test_there_is_one_for_every_row_of_table_5_that_has_windows_or_deformed_attention():
    assert {path.stem for path in RECIPES} == {
        f"ade20k_{head}_{size}" for head in DROP_PATH for size in ("tiny", "small", "base")
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe(path):
    config = load(path).config
    assert config.name == path.stem
    assert "Source: " in config.description and "Not run by us" in config.description
    assert ("unverified" in config.description) == ("dat" in path.stem), (
        "the authors published no file for DAT"
    )
    devices, micro = map(int, re.search(r"(\d+) devices x (\d+)", config.description).groups())
    assert micro == config.train.micro_batch
    assert derive(config, world=devices, samples_per_epoch=IMAGES).accumulation == 1
    assert derive(config, world=devices // 4, samples_per_epoch=IMAGES).accumulation == 4
    head, _, size = path.stem.removeprefix("ade20k_").rpartition("_")
    assert config.model.drop_path == DROP_PATH[head][("tiny", "small", "base").index(size)]
    assert (config.model.img_size, config.model.num_classes, config.geometry.crop) == (224, 150, 512)
    assert config.eval.mode == "whole" and config.optim.clip == 0
    with pytest.raises(ConfigError, match="init.from"):
        check_source(config)


def test_rates_and_lengths():
    """dense.md's sources: Swin's UperNet files; the authors' Semantic FPN files, whose batch is 32."""
    for path in RECIPES:
        config = load(path).config
        found = derive(config, world=8, samples_per_epoch=IMAGES)
        schedule = config.schedule
        if config.task.head == "upernet":
            assert (found.total_steps, found.warmup_steps, found.peak_lr) == (160_000, 1500, 6e-5)
            assert found.warmup_lr == pytest.approx(6e-11) and schedule.power == 1
            assert (config.train.global_batch, config.optim.weight_decay, config.task.aux_weight) == (
                16,
                0.01,
                0.4,
            )
        else:
            assert (found.total_steps, found.warmup_steps, found.peak_lr) == (40_000, 0, 2e-4)
            assert (config.train.global_batch, config.optim.weight_decay, schedule.power) == (32, 1e-4, 0.9)
        assert schedule.kind == "poly" and found.min_lr == 0
