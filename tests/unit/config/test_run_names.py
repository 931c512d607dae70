import os

import pytest

from dattrain.config.load import loads
from dattrain.config.run import absolute, check_folder_name, resolve, split_checkpoint
from dattrain.errors import ConfigError


def test_paths_are_made_absolute_and_what_is_no_path_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = os.getcwd()

    def of(spec):
        return absolute(loads(f"data: {{train: '{spec}'}}").config).data.train

    assert of("a/b") == f"{here}/a/b" and of("/x/../y") == "/x/../y"
    assert of("a/train-{00..03}.tar") == f"{here}/a/train-{{00..03}}.tar"
    assert of("a::b/*.tar") == f"{here}/a::{here}/b/*.tar"
    for other in ("s3://x/y", "a::https://h/y.tar", "pipe:cat a.tar"):
        assert of(other) == other
    config = absolute(loads("data: {val: v, cache_dir: c}\ninit: {from: runs/a@best}").config)
    assert (config.data.val, config.data.cache_dir, config.data.train) == (f"{here}/v", f"{here}/c", None)
    assert config.init.from_ == f"{here}/runs/a@best"
    assert absolute(config) == config
    # Joined to a folder of this name, a pattern would mean something else.
    (tmp_path / "a[1]").mkdir()
    monkeypatch.chdir(tmp_path / "a[1]")
    assert of("x/*.tar") == "x/*.tar"


def test_a_checkpoint_behind_an_at_and_names_that_merely_hold_one(tmp_path):
    assert split_checkpoint("runs/a@best") == (
        os.path.join("runs", "a") and split_checkpoint("runs/a")[0],
        "best",
    )
    assert split_checkpoint("runs/a") == split_checkpoint("runs/a/")
    (tmp_path / "me@home").mkdir()
    assert split_checkpoint(tmp_path / "me@home") == (tmp_path / "me@home", None)
    assert split_checkpoint(tmp_path / "me@home@12") == (tmp_path / "me@home", "12")
    assert split_checkpoint(tmp_path / "me@home" / "x")[1] is None


def test_what_can_be_no_run_folder_is_one_message(tmp_path):
    (tmp_path / "file").touch()
    for name, what in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "run", "cannot be a folder, since"),
        ("s3://bucket/run", "is a URL"),
        (tmp_path / "run@best", "leave out what follows the @"),
        (tmp_path / ("x" * 300), "no name of a folder"),
        ("a\0b", "no name of a folder"),
    ):
        with pytest.raises(ConfigError, match=what):
            resolve("demo/pretrain", [], type(tmp_path)(name), {})
    check_folder_name(tmp_path / "new" / "run")
    with pytest.raises(ConfigError, match="resumes at its last checkpoint"):
        resolve(str(tmp_path / "run@best"), [], None, {})
