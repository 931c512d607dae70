"""Profiles: what is refused, with which words; where they are found; Slurm's notation of time."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dattrain.config.shipped import CLUSTERS
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
        ("sbatch: {mem: 0}", "mem has a setting of its own (mem is mem_gb, which may be all)"),
        ("sbatch: {array: '0-2%2'}", "array is --array and --array-parallel"),
        ("sbatch: {ntasks_per_gpu: 1}", "ntasks_per_gpu is gpus_per_node, of which each has one task"),
        ("gpus_per_node: a100:4", "write gpus_per_node: 4 and gpu_type: a100 (found 'a100:4')"),
        ("gpus_per_node: gpu:a100:4", "write gpus_per_node: 4 and gpu_type: a100"),
        ("gpus_per_node: 'gpu:4'", "write gpus_per_node: 4 (found"),
        ("gpu_type: a100", "gpu_type: a100 without gpus_per_node"),
        (
            "gpus_per_node: 2\nsbatch: {gres: 'gpu:a100:4'}",
            "gres: gpu:a100:4 asks for 4 device(s) of a node, next to gpus_per_node=2",
        ),
        ("gpus_per_node: 4\ngpu_type: a100\nsbatch: {gres: 'gpu:4'}", "leave gres out"),
        ("mem_gb: all\nsbatch: {mem-per-gpu: 4G}", "mem_gb and sbatch: mem-per-gpu exclude each other"),
        (
            "cpus_per_task: 4\nsbatch: {cpus_per_gpu: 4}",
            "cpus_per_task and sbatch: cpus-per-gpu exclude each other",
        ),
        ("mem_gb: -1", "mem_gb"),
        ("mem_gb: .inf", "mem_gb"),
        ("mem_gb: most", "mem_gb"),
        ("rendezvous_suffix: 'i; rm'", "rendezvous_suffix"),
        ("environment: {'A B': 1}", "not the name of an environment variable"),
        ("- a", "a profile is a mapping"),
        ("a: [", "not YAML"),
        ("signal_delay_s: 0", "signal_delay_s"),
        ("sbatch: {clusters: east}", "SLURM_CLUSTERS in the shell"),
        ('setup: ["module load x", "#SBATCH --mail-type=END"]', "put it under sbatch"),
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


def test_there_are_profiles_to_ship() -> None:
    assert {"generic", "local", "h100x8-infiniband"} <= {path.stem for path in CLUSTERS.glob("*.yaml")}


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


def test_all_of_the_memory_has_two_names(tmp_path: Path) -> None:
    for text in ("mem_gb: all", "mem_gb: 0"):
        assert cluster.load(_write(tmp_path, text)).mem_gb == 0


@pytest.mark.parametrize(
    ("gres", "count"),
    [("gpu", 1), ("gpu:4", 4), ("gpu:a100", 1), ("gres/gpu:a100:2,gpu:h100:2,nvme:9", 4)],
)
def test_devices_of_a_gres_are_those_of_the_profile(gres: str, count: int) -> None:
    assert cluster.Profile(gpus_per_node=count, sbatch={"gres": gres}).gres == gres
    assert cluster.Profile(gpus_per_node=count, sbatch={"gres": "nvme:1"}).gres is None


def test_a_user_without_a_home_has_the_shipped_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)

    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert cluster.load("generic").kind == "slurm"
    with pytest.raises(ConfigError, match="did you mean generic"):
        cluster.load("genric")


def test_overrides_of_the_command_line_are_checked_too(tmp_path: Path) -> None:
    path = _write(tmp_path, "gpus_per_node: 8")
    assert cluster.load(path, {"gpus_per_node": 2}).tasks == 2
    with pytest.raises(ConfigError, match="time"):
        cluster.load(path, {"time": "later"})
