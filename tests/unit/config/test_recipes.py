"""Every recipe in configs/ loads, says where it comes from, and divides over the devices that it names."""

import re
from pathlib import Path

import pytest

from dattrain.cli import main as cli
from dattrain.config.derive import check_source, derive
from dattrain.config.load import diff, load
from dattrain.config.run import resolve
from dattrain.errors import ConfigError

CONFIGS = Path(__file__).parents[3] / "configs"
RECIPES = sorted(
    p for folder in ("scratch", "pretrain", "finetune") for p in (CONFIGS / folder).glob("*.yaml")
)


def recipe(path: str, *overrides: str):
    return load(CONFIGS / path, overrides).config


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
    assert derive(config, world=8, samples_per_epoch=1_281_167).accumulation == devices // 8
    assert config.augment.mix_group == 2, "the unit of mixing is said, and is that of the page"
    assert config.init.required == (path.parent.name == "finetune")
    if config.init.required:
        with pytest.raises(ConfigError, match="init.from=RUN_OR_WEIGHTS, for example init.from=runs/"):
            check_source(config)
    check_source(load(path, [f"init.from={CONFIGS}"]).config)


@pytest.mark.full
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_is_planned(path, capsys):
    source = [f"init.from={CONFIGS}"] if path.parent.name == "finetune" else []
    assert cli.main(["plan", str(path), *source, "--nodes", "4", "--device-gb", "1000"]) == 0
    assert load(path).config.model.name in capsys.readouterr().out


def test_rates_of_the_authors_runs():
    """dat.md sections 3 and 9: 4e-3 at 4,096 (3.2e-3 for base), 1e-3 at 1,024; 22K at 1e-3; 300 epochs of 1,281,167 images."""

    def derived(path, world, samples=1_281_167):
        return derive(recipe(path), world=world, samples_per_epoch=samples)

    tiny = derived("scratch/in1k_dat_tiny_224.yaml", 32)
    assert tiny.peak_lr == pytest.approx(4e-3) and tiny.total_steps == 93_836
    assert derived("scratch/in1k_dat_small_224.yaml", 32).peak_lr == pytest.approx(4e-3)
    assert derived("scratch/in1k_dat_base_224.yaml", 32).peak_lr == pytest.approx(3.2e-3)
    node = derived("scratch/in1k_dat_tiny_224_b1024.yaml", 8)
    assert node.peak_lr == pytest.approx(1e-3) and node.total_steps == 375_342
    assert derived("scratch/in1k_dat_pp_base_224.yaml", 64).peak_lr == pytest.approx(4e-3)
    assert derived("finetune/in1k_dat_tiny_224_from_22k.yaml", 8).peak_lr == pytest.approx(4e-5)
    base = derived("pretrain/in22k_dat_base_224.yaml", 32, 13_673_551)
    assert base.peak_lr == pytest.approx(1e-3) and base.warmup_steps == 16691


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_the_variant_at_1024_differs_in_the_batch_alone(size):
    """And quotes no accuracy of 4,096 as its own."""
    paper, node = (load(CONFIGS / f"scratch/in1k_dat_{size}_224{tail}.yaml") for tail in ("", "_b1024"))
    assert {key for key, *_ in diff(paper, node)} == {"name", "description", "train.global_batch"}
    said = node.config.description
    assert ("81.8" in said) == (size == "tiny") and ("No accuracy at this batch is known" in said) == (
        size != "tiny"
    )
    assert {"tiny": "82.0", "small": "83.7", "base": "84.0"}[size] in paper.config.description


def test_each_recipe_evaluates_as_its_source():
    """DAT squashes to a square, Swin, and so 22K and what comes from it, keeps the shorter side; at 384 the whole image."""
    for path in RECIPES:
        config = load(path).config
        swin = "22k" in path.stem and config.model.img_size == 224
        assert config.eval.resize == ("shorter" if swin else "squash"), path.stem
        whole = path.stem in ("in1k_dat_pp_base_384", "in1k_dat_base_384_from_22k")
        assert config.eval.crop_pct == (1.0 if whole else 0.875), path.stem


@pytest.mark.parametrize(
    "path",
    sorted((CONFIGS / "demo").glob("*tune.yaml")) + [CONFIGS / "demo/pretrain.yaml"],
    ids=lambda p: p.stem,
)
def test_demo_recipes_divide_over_two_ranks(path):
    assert derive(load(path).config, world=2, samples_per_epoch=8000).accumulation == 1


@pytest.mark.parametrize(
    "word",
    [
        "in1k_dat_tiny_224",
        "in1k_dat_tiny_224.yaml",
        "scratch/in1k_dat_tiny_224",
        "configs/scratch/in1k_dat_tiny_224.yaml",
    ],
)
def test_a_recipe_is_found_by_its_name_anywhere(word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load(word).config.name == "in1k_dat_tiny_224"
    (tmp_path / "mine.yaml").write_text(f"extends: {word}\nname: mine\n")
    assert load("mine.yaml").config.model.name == "dat_tiny"


def test_a_file_here_comes_before_a_shipped_name_and_what_is_neither_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in1k_dat_tiny_224").write_text("name: mine\n")
    assert load("in1k_dat_tiny_224").config.name == "mine"
    with pytest.raises(ConfigError, match="did you mean scratch/in1k_dat_tiny_224"):
        load("in1k_dat_tny_224")


def test_a_folder_of_that_name_hides_no_recipe_and_a_chain_is_told_from_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in1k_dat_tiny_224").mkdir()
    assert load("in1k_dat_tiny_224").config.name == "in1k_dat_tiny_224"
    assert resolve("in1k_dat_tiny_224", [], tmp_path / "run", {})[0].name == "in1k_dat_tiny_224"
    with pytest.raises(ConfigError, match="it is a chain: dattrain submit in22k_to_in1k_384"):
        load("in22k_to_in1k_384")
    with pytest.raises(ConfigError, match="did you mean in22k_to_in1k_384"):
        load("in22k_to_in1k_38")
    (tmp_path / "picture.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="picture.yaml: not a recipe"):
        load("picture.yaml")
