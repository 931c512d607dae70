import errno
import os
import socket
import stat

import pytest

from dattrain.errors import UserError
from dattrain.runtime import environment, preflight
from dattrain.runtime.environment import Env


def env(**changes):
    told = {
        "rank": 0,
        "local_rank": 0,
        "world": 2,
        "local_world": 2,
        "master_addr": "127.0.0.1",
        "master_port": 0,
        "launcher": "slurm",
        "host": "node7",
    }
    return Env(**{**told, **changes})


def test_a_master_that_does_not_resolve_is_named_with_the_node_that_looked():
    with pytest.raises(
        UserError, match=r"node7: the host of rank 0, 'nowhere\.invalid', does not resolve.*rendezvous_suffix"
    ):
        preflight.reach(env(rank=1, master_addr="nowhere.invalid"), timeout_s=0.0)


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"node7: port {port} cannot be opened"):
            preflight.reach(env(master_port=port))
        preflight.reach(env(master_port=port, rank=1))  # only rank 0 opens it
    preflight.reach(env(master_port=port))


def test_one_process_needs_no_network():
    preflight.reach(env(world=1, master_addr="nowhere.invalid"))


def check(folder):
    import torch

    alone = environment.resolve({})
    with environment.process_group(alone, torch.device("cpu")):
        return preflight.check(alone, folder)


def refuse(monkeypatch, call, code, *, folders):
    """``os.CALL`` fails with ``code`` on folders, or on files."""
    real = getattr(os, call)

    def refused(target, *rest):
        mode = (os.fstat if call == "fsync" else os.stat)(target).st_mode
        if stat.S_ISDIR(mode) == folders:
            raise OSError(code, os.strerror(code))
        return real(target, *rest)

    monkeypatch.setattr(os, call, refused)


@pytest.mark.parametrize(
    "call, code, folders, told",
    [
        ("rename", errno.ENOSYS, True, "folders cannot be renamed in {} (ENOSYS: Function not implemented)"),
        ("rename", errno.EXDEV, False, "files cannot be renamed in {} (EXDEV: "),
        ("fsync", errno.EIO, True, "folders cannot be synced (fsync) in {} (EIO: Input/output error)"),
        ("fsync", errno.EINVAL, False, "files cannot be synced (fsync) in {} (EINVAL: "),
    ],
)
def test_what_a_save_could_not_do_is_told_at_the_start_even_to_one_process(
    tmp_path, monkeypatch, call, code, folders, told
):
    (tmp_path / "checkpoints").mkdir()
    with monkeypatch.context() as broken:
        refuse(broken, call, code, folders=folders)
        with pytest.raises(UserError) as error:
            check(tmp_path)
    assert told.format(tmp_path / "checkpoints") in str(error.value)
    assert "choose a --run folder on a file system where that works" in str(error.value)


def test_a_folder_that_holds_saves_is_left_as_it_was(tmp_path):
    assert "folders are written, synced and renamed" in check(tmp_path / "run").lines()[0]
    assert list((tmp_path / "run").iterdir()) == []


def test_file_systems_without_fsync_of_folders_are_trusted(tmp_path, monkeypatch):
    refuse(monkeypatch, "fsync", errno.EINVAL, folders=True)
    check(tmp_path)


def test_a_link_to_nowhere_in_place_of_the_checkpoints_is_named(tmp_path):
    (tmp_path / "checkpoints").symlink_to(tmp_path / "purged")
    with pytest.raises(UserError, match=r"folders cannot be made in .* \(EEXIST: "):
        check(tmp_path)


def test_what_does_not_appear_is_looked_for_more_and_more_seldom(tmp_path, monkeypatch):
    """By every rank at once, and each look lists a folder."""
    now, looks, problems = [0.0], [], []
    monkeypatch.setattr(preflight.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(preflight.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))
    monkeypatch.setattr(preflight.os, "listdir", looks.append)
    preflight._look(tmp_path / "a" / "b", "token", problems)
    assert len(looks) <= 40 and now[0] <= preflight._VISIBLE_S + 2 and "is missing" in problems[0]


def test_the_sum_that_is_checked_is_exact_in_fp32_for_any_number_of_ranks():
    assert sum(map(preflight._share, range(100_000))) < 2**24
