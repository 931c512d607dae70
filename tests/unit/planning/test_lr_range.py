"""The learning-rate range test: what is read off a curve, and the verb on a tiny network through the trainer's own updates."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import warm

sys.path.insert(0, str(Path(__file__).parents[2] / "dist"))
from train_worker import pack, recipe

from dattrain.errors import ConfigError
from dattrain.planning import lr_range
from dattrain.planning.lr_range import RangeTest


def _curve(noise: float = 0.0) -> RangeTest:
    """Flat at 2, falling fastest at 1e-3, then rising: what such tests show."""
    over = lr_range.rates(1e-6, 1.0, 120)
    losses = [
        2 - 1 / (1 + math.exp(-4 * (math.log10(r) + 3))) + max(0.0, math.log10(r) + 1) ** 2 + noise * math.sin(37 * n)
        for n, r in enumerate(over)
    ]  # fmt: skip
    return RangeTest(over, losses, False)


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_the_rate_to_use_is_where_the_smoothed_loss_falls_fastest(noise: float) -> None:
    found = lr_range.suggest(_curve(noise))
    assert found is not None
    assert math.log10(found.steepest) == pytest.approx(-3, abs=0.35)
    assert found.steepest < found.lowest < 0.2


def test_a_loss_that_does_not_fall_suggests_nothing() -> None:
    over = lr_range.rates(1e-6, 1.0, 30)
    assert lr_range.suggest(RangeTest(over, [2.0] * 30, False)) is None
    assert lr_range.suggest(RangeTest(over, [2.0 + n for n in range(30)], True)) is None
    assert lr_range.suggest(RangeTest(over[:2], [2.0, 1.0], True)) is None


def test_it_ends_where_the_loss_has_left_its_valley_and_not_at_one_high_loss() -> None:
    assert not lr_range.diverged([1.0] * 12 + [9.0])
    assert lr_range.diverged([1.0] * 12 + [9.0] * 5)
    assert not lr_range.diverged([9.0] * 5)


def test_rates_grow_by_one_factor() -> None:
    over = lr_range.rates(1e-4, 1e-1, 31)
    assert (
        over[0] == pytest.approx(1e-4) and over[10] == pytest.approx(1e-3) and over[-1] == pytest.approx(0.1)
    )
    for arguments in ((1e-3, 1e-4, 20), (0.0, 1.0, 20), (1e-4, 1e-3, 9)):
        with pytest.raises(ConfigError):
            lr_range.rates(*arguments)


def test_the_verb_trains_at_growing_rates_and_prints_the_setting(tmp_path: Path) -> None:
    data, path = pack(tmp_path), recipe(tmp_path)
    before = path.read_text()
    command = [
        sys.executable,
        "-m",
        "dattrain",
        "lr-find",
        str(path),
        *data[:1],
        "train.precision=fp32",
        "augment.mix_prob=0",
    ]
    command += ["--min", "1e-4", "--max", "1e4", "--updates", "24", "--run", str(tmp_path / "found")]
    done = warm.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found" / "lr_find.json").read_text())
    assert (tmp_path / "found" / "lr_find.png").read_bytes()[:4] == b"\x89PNG"
    assert found["diverged"] and 10 <= len(found["losses"]) < 24
    assert found["losses"][0] == pytest.approx(math.log(10), abs=0.3)
    assert found["optim.lr"] == pytest.approx(
        found["suggestion"]["steepest"]
    )  # the batch is the one at which it is stated
    assert f"optim.lr={found['optim.lr']:.2e}" in done.stdout
    assert path.read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "found",
        "recipe.yaml",
        "train",
        "train.npz",
        "val",
        "val.npz",
    ]
