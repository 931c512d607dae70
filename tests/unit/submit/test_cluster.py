"""Profiles: what is refused, with which words; where they are found; Slurm's notation of time."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dattrain.errors import ConfigError
from dattrain.submit import cluster


def _write(folder: Path, text: str, name: str = "mine") -> str:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("partion: gpu", "unknown key partion; did you mean partition?"),
        (
            "container: {image: x, runtime: pyxis, mount: [a]}",
            "unknown key container.mount; did you mean container.mounts?",
        ),
        ("zzz: 1", "known here: kind, partition"),
        ("gpus_per_node: eight", "gpus_per_node"),
        ("time: 24:00:00", "put the time in quotes"),
        ("time: soon", "'soon' is not a time"),
        ("requeue: never", "'scontrol' or 'follow-up'"),
        ("gpus_per_node: 4\ntasks_per_node: 2", "one task per device"),
        ("sbatch: {partition: x}", "partition has a setting of its own"),
        ("environment: {'A B': 1}", "not the name of an environment variable"),
        ("- a", "a profile is a mapping"),
        ("a: [", "not YAML"),
        ("signal_delay_s: 0", "signal_delay_s"),
    ],
)
def test_refusals_name_file_key_and_remedy(tmp_path: Path, text: str, words: str) -> None:
    path = _write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        cluster.load(path)
    assert words in str(caught.value)
    assert path in str(caught.value)


def test_unknown_profile_offers_the_nearest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="did you mean generic"):
        cluster.load("genric")
    with pytest.raises(ConfigError, match="no such file"):
        cluster.load("./nowhere.yaml")


def test_the_users_own_profile_comes_before_the_shipped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert cluster.load("generic").partition is None
    (tmp_path / "dattrain" / "clusters").mkdir(parents=True)
    _write(tmp_path / "dattrain" / "clusters", "partition: mine", "generic")
    assert cluster.load("generic").partition == "mine"


@pytest.mark.parametrize("path", sorted(cluster.SHIPPED.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_profiles_load(path: Path) -> None:
    assert cluster.load(path.stem).kind in ("slurm", "local")


def test_there_are_profiles_to_ship() -> None:
    assert {"generic", "local", "h100x8-infiniband"} <= {path.stem for path in cluster.SHIPPED.glob("*.yaml")}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90),
        ("1:30", 2),
        ("24:00:00", 1440),
        ("2-0", 2880),
        ("1-2:3", 1563),
        ("1-02:03:04", 1564),
        ("0:01", 1),
    ],
)
def test_time_in_slurms_notation(text: str, expected: int) -> None:
    assert cluster.minutes(text) == expected


@given(st.integers(0, 30), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_time_never_loses_a_second(days: int, hours: int, mins: int, secs: int) -> None:
    total = ((days * 24 + hours) * 60 + mins) * 60 + secs
    text = f"{days}-{hours:02}:{mins:02}:{secs:02}"
    if total == 0:
        with pytest.raises(ValueError, match="no time at all"):
            cluster.minutes(text)
    else:
        assert 0 <= cluster.minutes(text) * 60 - total < 60


def test_numbers_in_environment_become_text(tmp_path: Path) -> None:
    assert cluster.load(_write(tmp_path, "environment: {A: 1}")).environment == {"A": "1"}


def test_overrides_of_the_command_line_are_checked_too(tmp_path: Path) -> None:
    path = _write(tmp_path, "gpus_per_node: 8")
    assert cluster.load(path, {"gpus_per_node": 2}).tasks == 2
    with pytest.raises(ConfigError, match="time"):
        cluster.load(path, {"time": "later"})
