"""Files are there in full or not at all, whatever happens between the first byte and the renaming."""

import errno
import os
import stat

import pytest

from dattrain import files
from dattrain.files import Failed, replacing, write_atomically


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_fails_half_way_leaves_the_older_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    with pytest.raises(error), replacing(path) as part:
        part.write_bytes(b"half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_atomically(path, "new \u00e9")
    assert path.read_bytes() == "new \u00e9".encode() and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "call, durable, said",
    [
        ("fsync", True, "syncing \\(fsync\\) a.json: EIO: "),
        ("replace", False, "renaming .a.json.*.part to a.json: EIO: "),
    ],
)
def test_an_error_names_the_operation_and_leaves_the_older_file(tmp_path, monkeypatch, call, durable, said):
    path = tmp_path / "a.json"
    write_atomically(path, b"old")

    def refused(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, refused)
    with pytest.raises(Failed, match=said) as error:
        write_atomically(path, b"new", durable=durable)
    assert error.value.errno == errno.EIO
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_durable_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def noted(fd):
        fsync(fd)
        synced.append((os.fstat(fd).st_ino, os.fstat(fd).st_size, (tmp_path / "a").exists()))

    monkeypatch.setattr(os, "fsync", noted)
    write_atomically(tmp_path / "a", b"12345", durable=True)
    assert synced == [((tmp_path / "a").stat().st_ino, 5, False)]
    write_atomically(tmp_path / "b", b"12345")
    assert len(synced) == 1


def test_a_private_file_is_never_for_others_to_read(tmp_path):
    (tmp_path / "a").touch(0o644)
    with replacing(tmp_path / "a", private=True) as part:
        assert stat.S_IMODE(part.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_whose_entries_may_be_lost_is_an_error(tmp_path, monkeypatch, code):
    def refused(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refused)
    with pytest.raises(OSError) as error:
        files.sync(tmp_path)
    assert error.value.errno == code
