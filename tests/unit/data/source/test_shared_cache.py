"""One cache folder and several users, or none who may write it. With real users where the tests run as root."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from dattrain.data.source.disk_cache import Cache, Unwritable
from dattrain.errors import UserError

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes other users' places")
ANN, BOB = 1001, 1002
DATA = bytes(range(256)) * 4


def put(cache: Cache, name: str, data: bytes = DATA, **more) -> int | None:
    return cache.fetch(name, len(data), lambda fd: os.pwrite(fd, data, 0), **more)


def content(fd: int | None) -> bytes | None:
    if fd is None:
        return None
    with open(fd, "rb") as file:
        return file.read()


def user(uid: int, task, umask: int = 0o022) -> str:
    """What a task says in a process of that user: "" or its error."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = ""
        try:
            os.umask(umask)
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            task()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        said = file.read().decode()
    os.waitpid(pid, 0)
    return said


@pytest.fixture
def shared():
    """A folder that every user may write; pytest's own is its user's alone."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


@as_root
@pytest.mark.parametrize("umask", [0o022, 0o000, 0o027])
def test_what_one_user_fetched_the_other_reads(shared, umask):
    def ann():
        put(Cache(shared, 10**6), "a.tar")

    def bob():
        cache = Cache(shared, 10**6)
        assert content(cache.open("a.tar")) == DATA
        assert content(put(cache, "a.tar", DATA[::-1])) == DATA
        cache.touch("a.tar")
        assert content(put(cache, "b.tar")) == DATA

    assert user(ANN, ann, umask) == ""
    if umask == 0o027:
        assert "a.tar cannot be read" in user(BOB, bob)
        return
    assert user(BOB, bob, umask) == ""
    assert user(ANN, lambda: put(Cache(shared, 10**6), "b.tar", DATA[::-1]), umask) == ""
    assert (shared / "b.tar").stat().st_uid == BOB and (shared / "b.tar").read_bytes() == DATA


@as_root
def test_room_is_made_of_what_is_ones_own_and_never_waited_for_in_vain(shared):
    small = 2 * len(DATA)

    def bob():
        cache = Cache(shared, small)
        put(cache, "b.tar")
        assert content(put(cache, "c.tar")) == DATA and "b.tar" not in cache and "a.tar" in cache
        with pytest.raises(UserError, match="belong to other users"):
            put(cache, "large.tar", 2 * DATA)

    assert user(ANN, lambda: put(Cache(shared, small), "a.tar")) == ""
    assert user(BOB, bob) == ""


@as_root
def test_what_a_killed_user_left_is_no_hindrance(shared):
    def ann():
        Cache(shared, 10**6)
        (shared / f"a.tar.{ANN}.part").write_bytes(DATA)

    assert user(ANN, ann) == ""
    assert user(BOB, lambda: put(Cache(shared, 2 * len(DATA)), "a.tar")) == ""
    assert (shared / "a.tar").read_bytes() == DATA
    assert "belong to other users" in user(BOB, lambda: put(Cache(shared, 2 * len(DATA)), "b.tar", 2 * DATA))


@as_root
@pytest.mark.parametrize("locks", [True, False])
def test_a_cache_that_may_not_be_written_is_read(shared, locks):
    put(Cache(shared, 10**6), "a.tar")
    if not locks:
        shutil.rmtree(shared / ".locks")
    shared.chmod(0o755)

    def bob():
        cache = Cache(shared, 10**6)
        assert content(cache.open("a.tar")) == DATA and "a.tar" in cache
        for wait in (True, False):
            with pytest.raises(Unwritable, match="cannot be written"):
                put(cache, "b.tar", wait=wait)

    assert user(BOB, bob) == ""


def test_a_cache_mounted_read_only_is_read(tmp_path, monkeypatch):
    """As the kernel answers there; the folder itself is writable."""
    cache = Cache(tmp_path, 10**6)
    put(cache, "a.tar")
    opens = os.open

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    def read_only(path, flags, *more, **kw):
        return refuse() if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT) else opens(path, flags, *more, **kw)

    for name in ("utime", "unlink", "chmod", "fchmod"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(Path, "unlink", refuse)
    cache = Cache(tmp_path, 10**6)
    assert content(cache.open("a.tar")) == DATA and content(put(cache, "a.tar")) == DATA
    with pytest.raises(Unwritable, match="Read-only file system"):
        put(cache, "b.tar")


def test_a_shard_is_indexed_although_its_cache_may_not_be_written(tmp_path, monkeypatch):
    from answering import Clock, answering, file
    from faulty import write_shards

    from dattrain.data.source.download import Transfer
    from dattrain.data.source.remote import open_remote

    write_shards(tmp_path / "set", shards=1, samples=4)
    with answering(lambda asked: file(tmp_path / "set", asked)) as (url, _):
        _, source = open_remote(
            url, cache_dir=str(tmp_path / "cache"), cache_gb=1, transfer=Transfer(hosts=Clock().hosts)
        )
        source.read(0, 0, 512)

        def refuse(*_, **__):
            raise Unwritable("read-only")

        monkeypatch.setattr(source.cache, "fetch", refuse)
        assert len(source.index(0)) == 4


def test_uses_are_in_order_however_quick(tmp_path):
    cache = Cache(tmp_path, 3 * len(DATA))
    for name in ("a", "b", "c"):
        os.close(put(cache, name))
    for name in ("c", "a", "b"):
        cache.touch(name)
    os.close(put(cache, "d"))
    assert {n for n in "abcd" if n in cache} == {"a", "b", "d"}
