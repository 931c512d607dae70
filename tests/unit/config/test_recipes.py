"""Every recipe in configs/ loads, says where it comes from, and divides over the devices that it names."""

import re
from pathlib import Path

import pytest

from dattrain.config.derive import derive
from dattrain.config.load import load

CONFIGS = Path(__file__).parents[3] / "configs"
RECIPES = sorted(
    p for folder in ("scratch", "pretrain", "finetune") for p in (CONFIGS / folder).glob("*.yaml")
)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe(path):
    config = load(path).config
    assert config.name == path.stem
    assert "Source: " in config.description and "run by us" in config.description
    devices, micro = map(
        int, re.search(r"(\d+) devices x (\d+)", config.description.replace("\n", " ")).groups()
    )
    assert micro == config.train.micro_batch
    assert derive(config, world=devices, samples_per_epoch=1_281_167).accumulation == 1


def test_rates_of_the_authors_runs():
    """dat.md section 3: lr 1e-3 at 1,024 for DAT-T, 1e-3 at 4,096 for 22K, 300 epochs of 1,281,167 images."""
    tiny = derive(
        load(CONFIGS / "scratch/in1k_dat_tiny_224.yaml").config, world=8, samples_per_epoch=1_281_167
    )
    assert tiny.peak_lr == pytest.approx(1e-3) and tiny.total_steps == 375_342
    base = derive(
        load(CONFIGS / "pretrain/in22k_dat_base_224.yaml").config, world=32, samples_per_epoch=13_673_551
    )
    assert base.peak_lr == pytest.approx(1e-3) and base.warmup_steps == 16691


@pytest.mark.parametrize(
    "path",
    sorted((CONFIGS / "demo").glob("*tune.yaml")) + [CONFIGS / "demo/pretrain.yaml"],
    ids=lambda p: p.stem,
)
def test_demo_recipes_divide_over_two_ranks(path):
    assert derive(load(path).config, world=2, samples_per_epoch=8000).accumulation == 1
