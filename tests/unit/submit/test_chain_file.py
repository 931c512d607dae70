"""Chains: order, run folders, where each stage starts from, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from dattrain.config.shipped import CHAINS
from dattrain.errors import ConfigError
from dattrain.submit import chain

CHAIN = """
name: three
stages:
  first: {config: first.yaml, nodes: 2, time: "2:00:00"}
  second: {config: second.yaml, from: first, overrides: [train.seed=5]}
  look: {evaluate: second, nodes: 1}
"""


def _folder(tmp_path: Path, text: str = CHAIN) -> Path:
    (tmp_path / "first.yaml").write_text("name: first\n")
    (tmp_path / "second.yaml").write_text("name: second\n")
    (tmp_path / "chain.yaml").write_text(text)
    return tmp_path / "chain.yaml"


def _resolve(path: Path, overrides: Sequence[str] = ()) -> list[chain.ResolvedStage]:
    return chain.resolve(chain.read(path), path, Path("/r"), overrides)


def test_each_stage_starts_from_the_run_folder_of_the_one_before(tmp_path: Path) -> None:
    path = _folder(tmp_path)
    read = chain.read(path)
    planned = chain.resolve(read, path, Path("/runs/three"), ["second.optim.lr=1e-4"])
    assert read.name == "three"
    assert [p.run for p in planned] == [Path("/runs/three") / name for name in ("first", "second", "look")]
    assert [p.loaded.config.init.from_ for p in planned] == [None, "/runs/three/first", "/runs/three/second"]
    assert [p.loaded.config.train.seed for p in planned] == [0, 5, 5]
    assert [p.loaded.config.optim.lr for p in planned] == [5e-4, 1e-4, 1e-4]
    assert planned[0].stage.size == {"nodes": "2", "time": "2:00:00"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            CHAIN.replace("from: first", "from: frist"),
            "stage second needs 'frist', which does not come before it",
        ),
        (CHAIN.replace("nodes: 2", "node: 2"), "did you mean stages.first.nodes?"),
        (
            CHAIN.replace("evaluate: second", "evaluate: second, config: a.yaml"),
            "either a config to train or a stage",
        ),
        ("name: x\nstages: {}", "stages"),
        (CHAIN.replace("look:", "a.b:"), "a name is used as a folder"),
    ],
)
def test_refusals(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _resolve(_folder(tmp_path, text))
    assert words in str(caught.value)
    assert "chain.yaml" in str(caught.value)


def test_an_override_names_its_stage(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stage\.section\.key=value; stages: first, second, look"):
        _resolve(_folder(tmp_path), ["train.seed=1"])


def test_a_recipe_is_not_a_chain(tmp_path: Path) -> None:
    path = _folder(tmp_path)
    assert chain.is_chain(path)
    assert not chain.is_chain(tmp_path / "first.yaml")
    assert not chain.is_chain(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("path", sorted(CHAINS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_chains_resolve(path: Path) -> None:
    assert len(_resolve(path)) == len(chain.read(path).stages) >= 2


def test_the_road_from_22k_to_1k_ships() -> None:
    planned = _resolve(CHAINS / "in22k_to_in1k_384.yaml")
    pretrain, finetune, evaluate = (p.loaded.config for p in planned)
    assert (pretrain.model.num_classes, pretrain.model.img_size) == (21841, 224)
    assert (finetune.model.num_classes, finetune.model.img_size) == (1000, 384)
    assert finetune.init.head == "map"
    assert evaluate.model == finetune.model
