"""What servers of real life do to a transfer: they ask to wait, let credentials expire, know no ranges."""

from __future__ import annotations

import email.utils
import hashlib
import os
import threading
import time
import tracemalloc

import fsspec
import pytest
from answering import Clock, answering

from dattrain.data.source.download import Refused, Transfer
from dattrain.data.source.server_errors import asked_to_wait
from dattrain.errors import UserError

SECRET = "hunter2"


def quick(clock: Clock | None = None, **changes) -> Transfer:
    hosts = (clock or Clock()).hosts
    return Transfer(
        **{"attempts": 4, "timeout": 2.0, "pause": 0.5, "longest_pause": 1.0, "hosts": hosts, **changes}
    )


def download(transfer: Transfer, url: str, size: int, sha256: str = "") -> bytes:
    fd = os.memfd_create("shard")
    try:
        transfer.download(url, fd, size, sha256)
        return os.pread(fd, size + 1, 0)
    finally:
        os.close(fd)


class TestRetryAfter:
    @pytest.mark.parametrize("status", [429, 503])
    @pytest.mark.parametrize("form", ["seconds", "date", "date of a server whose clock is wrong"])
    @pytest.mark.parametrize("call", ["read", "size"])
    def test_is_obeyed_in_each_form_by_get_and_head(self, status, form, call):
        clock = Clock()
        free = clock.now + 120

        def answer(asked):
            if clock.now >= free:
                return 200, {}, b"whole"
            if form == "seconds":
                return status, {"Retry-After": str(int(free - clock.now))}, b""
            shift = 86400 if "wrong" in form else 0
            headers = {"Retry-After": email.utils.formatdate(free + shift, usegmt=True)}
            if shift:
                headers["Date"] = email.utils.formatdate(clock.now + shift, usegmt=True)
            return status, headers, b""

        with answering(answer) as (url, got):
            found = getattr(quick(clock), call)(f"{url}/x.tar")
        assert found == (b"whole" if call == "read" else 5)
        assert 120 <= sum(clock.slept) < 127 and len(got) == 2

    def test_is_bounded_and_the_message_says_429(self):
        clock = Clock()
        with (
            answering(lambda asked: (429, {"Retry-After": "9" * 40}, b"")) as (url, _),
            pytest.raises(UserError, match="in 4 attempts; the last error was HTTP 429"),
        ):
            quick(clock).size(f"{url}/x.tar")
        assert len(clock.slept) == 3 and all(600 <= seconds <= 605 for seconds in clock.slept)

    @pytest.mark.parametrize("said", ["", "soon", "-5", "Mon, 99 Foo 2026", "0"])
    def test_that_says_nothing_leaves_the_pauses_as_they_are(self, said):
        clock = Clock()
        with (
            answering(lambda asked: (429, {"Retry-After": said}, b"")) as (url, _),
            pytest.raises(UserError, match="429"),
        ):
            quick(clock, pause=1.0, longest_pause=2.0).read(f"{url}/x.tar")
        assert len(clock.slept) == 3 and max(clock.slept) <= 2 * 1.3

    def test_holds_every_thread_transfer_and_forked_worker_back(self):
        clock = Clock()
        with answering(
            lambda asked: (429, {"Retry-After": "50"}, b"") if clock.now < 1050 else (200, {}, b"ok")
        ) as (url, got):
            quick(clock).read(f"{url}/a.tar")
            clock.now = 1010.0  # while that still waits
            threads = [
                threading.Thread(target=quick(clock).read, args=(f"{url}/{n}.tar",), daemon=True)
                for n in "bc"
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(10)
            assert [asked.path for asked in got][:2] == ["/a.tar", "/a.tar"] and len(got) == 4
        clock.hosts.hold("https://elsewhere", 30.0)
        pid = os.fork()
        if pid == 0:
            clock.slept.clear()
            clock.hosts.wait("https://elsewhere")
            os._exit(0 if clock.slept and clock.slept[0] >= 30 else 1)
        assert os.waitpid(pid, 0)[1] == 0

    def test_of_a_bucket(self):
        error = OSError(16, "Please reduce your request rate.")
        error.__cause__ = from_boto(503, {"retry-after": "7"})
        assert asked_to_wait(error, 0.0) == 7.0


def from_boto(status: int, headers=()) -> Exception:
    from botocore.exceptions import ClientError

    meta = {"HTTPStatusCode": status, "HTTPHeaders": dict(headers)}
    return ClientError({"Error": {"Code": str(status)}, "ResponseMetadata": meta}, "GetObject")


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def of_httpx(status: int) -> Exception:
    error = Exception(f"{status} Client Error for url: https://user:{SECRET}@hub/x?sig={SECRET}")
    error.response = type("Response", (), {"status_code": status, "headers": {}})()
    return error


def of_gcsfs(status: int) -> Exception:
    error = type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})("Invalid Credentials")
    error.code = status
    return error


EXPIRED = {
    "s3 get": lambda: caused(PermissionError("The provided token has expired."), from_boto(400)),
    "s3 head": lambda: caused(OSError(22, "Bad Request"), from_boto(400)),
    "s3 forbidden": lambda: caused(PermissionError("Forbidden"), from_boto(403)),
    "s3 refresh": lambda: OSError(22, "TokenRefreshRequired"),
    "hub": lambda: caused(FileNotFoundError("no such repository"), of_httpx(401)),
    "gcs": lambda: of_gcsfs(401),
}


class Expiring:
    """A file system whose credentials, read when it is opened, are good for ``good`` calls; ``renewed``: what they are then."""

    async_impl = False
    opened = 0

    def __init__(self, error, good: int = 2) -> None:
        type(self).opened += 1
        self.error, self.good = error, good

    def cat_file(self, path, start=None, end=None):
        self.good -= 1
        if self.good < 0:
            raise self.error()
        return b"bytes"


@pytest.fixture
def opening(monkeypatch):
    Expiring.opened = 0

    def set_up(*systems):
        left = list(systems)
        monkeypatch.setattr(fsspec, "filesystem", lambda scheme, **_: left.pop(0)())

    return set_up


class TestExpiredCredentials:
    @pytest.mark.parametrize("kind", EXPIRED)
    def test_are_read_anew_at_each_expiry(self, kind, opening):
        opening(*[lambda: Expiring(EXPIRED[kind])] * 5)
        transfer = quick()
        assert [transfer.read("s3://bucket/x") for _ in range(10)] == [b"bytes"] * 10
        assert Expiring.opened == 5

    @pytest.mark.parametrize("kind", EXPIRED)
    def test_that_nobody_renewed_end_it_after_one_more_attempt(self, kind, opening):
        opening(*[lambda: Expiring(EXPIRED[kind], good=0)] * 5)
        clock = Clock()
        with pytest.raises(Refused, match="credentials were read anew and did not help") as found:
            quick(clock).read("s3://bucket/x")
        assert Expiring.opened == 2 and not clock.slept
        assert SECRET not in str(found.value) and found.value.__suppress_context__

    def test_of_several_threads_are_read_anew_once(self, opening):
        gate = threading.Barrier(4)

        def fail():
            gate.wait(10)
            return PermissionError("expired")

        opening(lambda: Expiring(fail, good=1), lambda: Expiring(fail, good=99))
        transfer = quick()
        transfer.read("s3://bucket/x")
        threads = [threading.Thread(target=transfer.read, args=("s3://bucket/x",)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert Expiring.opened == 2

    @pytest.mark.parametrize("status", [400, 401, 403])
    def test_of_a_signed_url_end_it_at_once_and_say_so(self, status):
        with (
            answering(lambda asked: (status, {}, b"")) as (url, got),
            pytest.raises(Refused, match=rf"HTTP {status} .*signature has expired") as found,
        ):
            quick().read(f"{url}/x.tar?X-Amz-Signature={SECRET}")
        assert len(got) == 1 and SECRET not in str(found.value)

    def test_a_certificate_is_no_credential(self, opening):
        opening(lambda: Expiring(lambda: OSError("certificate has expired"), good=0))
        with pytest.raises(UserError, match="in 2 attempts"):
            quick(attempts=2).read("s3://bucket/x")


class TestNoRanges:
    """A server that answers every range with the whole file."""

    def test_a_file_that_takes_longer_than_the_limit_of_a_block_comes_through_a_small_memory(self, caplog):
        piece, pieces = os.urandom(2**18), 40
        digest = hashlib.sha256(piece * pieces).hexdigest()

        def body():
            for i in range(pieces):
                if i % 10 == 0:
                    time.sleep(0.25)
                yield piece

        def answer(asked):
            return 200, {"Content-Length": str(len(piece) * pieces)}, body()

        with answering(answer) as (url, got):
            transfer = quick(timeout=0.6, block=2**20)
            fd = os.memfd_create("shard")
            tracemalloc.start()
            began = time.monotonic()
            for _ in range(2):
                transfer.download(f"{url}/x.tar", fd, len(piece) * pieces, digest)
            assert time.monotonic() - began > 2 * 0.6
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            os.close(fd)
        assert len(got) == 2 and peak < 6 * 2**20
        assert [r.getMessage() for r in caplog.records if "ranges" in r.getMessage()] == [
            f"{url} knows no ranges: a shard comes in one piece, and from its beginning again after each break"
        ]

    @pytest.mark.parametrize("fault", ["silence", "short", "cut"])
    def test_a_break_begins_it_again(self, fault):
        data, turns = os.urandom(300_000), [fault, "good"]

        def answer(asked):
            turn = turns.pop(0)
            half = data[: len(data) // 2]

            def silent():
                yield half
                time.sleep(1.0)

            headers = {"Content-Length": str(len(data))}
            if turn == "silence":
                return 200, headers, silent()
            if turn == "cut":
                return 200, {**headers, "Connection": "close"}, [half]
            return 200, {}, data[:1000] if turn == "short" else data

        with answering(answer) as (url, _):
            transfer = quick(timeout=0.4, block=2**16)
            assert download(transfer, f"{url}/x", len(data), hashlib.sha256(data).hexdigest()) == data

    def test_a_file_of_another_size_is_refused_with_both(self):
        with (
            answering(lambda asked: (200, {}, bytes(200_000))) as (url, _),
            pytest.raises(UserError, match="has 200000 bytes, but its index was built for 150000"),
        ):
            download(quick(block=2**16), f"{url}/x", 150_000)

    def test_a_full_disk_is_no_reason_to_ask_again(self, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        with answering(lambda asked: (200, {}, bytes(200_000))) as (url, got):
            monkeypatch.setattr(os, "pwrite", full)
            with pytest.raises(OSError, match="No space left"):
                download(quick(block=2**16), f"{url}/x", 200_000)
        assert len(got) == 1


def test_a_shard_that_ends_before_a_block_is_named_with_both_sizes():
    def answer(asked):
        if asked.headers.get("Range", "").startswith("bytes=0-"):
            return 206, {"Content-Range": "bytes 0-65535/65536"}, bytes(65536)
        return (416, {}, b"") if asked.method == "GET" else (200, {"Content-Length": "65536"}, b"")

    with answering(answer) as (url, _), pytest.raises(UserError, match="has 65536 bytes, but .* for 150000"):
        download(quick(attempts=2, block=2**16), f"{url}/x", 150_000)


def part(asked, data: bytes, *, shift: int = 0, **headers: str):
    """The bytes that a request asks for, or those so many behind them; a body of another version has other headers."""
    first, last = map(int, asked.headers["Range"].removeprefix("bytes=").split("-"))
    body = data[first + shift : last + 1 + shift]
    return 206, {"Content-Range": f"bytes {first + shift}-{first + shift + len(body) - 1}/*", **headers}, body


@pytest.mark.parametrize("turn", [0, 1])
def test_another_range_than_the_one_asked_for_is_asked_for_again(turn):
    data, asked_for = os.urandom(200_000), []

    def answer(asked):
        asked_for.append(asked)
        return part(asked, data, shift=7 if len(asked_for) == turn + 1 else 0)

    with answering(answer) as (url, got):
        assert download(quick(block=2**16), f"{url}/x", len(data)) == data
    assert len(got) == 5
    with (
        answering(lambda asked: part(asked, data, shift=7)) as (url, _),
        pytest.raises(UserError, match="sent bytes from offset 7 on, not 0, .* in 4 attempts"),
    ):
        download(quick(block=2**16), f"{url}/x", len(data))


class TestReplaced:
    """A file of the same size takes the place of another between two blocks."""

    @pytest.mark.parametrize("names", [["ETag"], ["Last-Modified"], ["ETag", "Last-Modified"]])
    def test_its_parts_are_not_joined(self, names, caplog):
        old, new = os.urandom(200_000), os.urandom(200_000)

        def answer(asked):
            first = not caplog.records and asked.headers["Range"].startswith("bytes=0-")
            return part(asked, old if first else new, **dict.fromkeys(names, str(first)))

        with answering(answer) as (url, _):
            assert download(quick(block=2**16), f"{url}/x?{SECRET}", len(old)) == new
        assert "replaced while it was fetched" in caplog.text and SECRET not in caplog.text

    def test_again_and_again_it_is_refused_but_for_a_checksum(self):
        data, count = os.urandom(200_000), iter(range(99))
        with answering(lambda asked: part(asked, data, ETag=str(next(count)))) as (url, _):
            with pytest.raises(UserError, match="in both attempts, .* --checksum"):
                download(quick(block=2**16), f"{url}/x", len(data))
            digest = hashlib.sha256(data).hexdigest()
            assert download(quick(block=2**16), f"{url}/x", len(data), digest) == data

    def test_mirrors_may_have_tags_of_their_own(self, caplog):
        data, count = os.urandom(200_000), iter(range(99))

        def answer(asked):
            return part(
                asked, data, **{"ETag": str(next(count)), "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
            )

        with answering(answer) as (url, _):
            assert download(quick(block=2**16), f"{url}/x", len(data)) == data
        assert not caplog.records


@pytest.mark.parametrize("status", [204, 302, 304])
def test_an_answer_without_a_file_is_called_so(status):
    with (
        answering(lambda asked: (status, {}, b"")) as (url, _),
        pytest.raises(UserError, match=f"sent HTTP status {status} and no file"),
    ):
        download(quick(block=2**16), f"{url}/x", 200_000)


@pytest.mark.parametrize("call", ["read", "size", "download"])
def test_a_redirect_to_another_host_takes_no_credentials_along(call):
    data = os.urandom(100_000)
    with (
        answering(lambda asked: (200, {}, data)) as (there, got),
        answering(lambda asked: (302, {"Location": there.replace("127.0.0.1", "localhost") + "/y"}, b"")) as (
            url,
            asked,
        ),
    ):
        spec = f"{url.replace('//', f'//ann:{SECRET}@')}/x?{SECRET}"
        if call == "download":
            assert download(quick(), spec, len(data)) == data
        else:
            assert getattr(quick(), call)(spec) in (data, len(data))
    assert all(one.headers.get("Authorization") and one.query for one in asked)
    assert got and not any(
        SECRET in f"{one.query} {one.headers}" or one.headers.get("Authorization") for one in got
    )


def test_the_proxy_of_the_environment_is_used_and_its_refusal_is_told(monkeypatch):
    answers = [(200, {}, b"whole"), (407, {}, b"")]
    with answering(lambda asked: answers.pop(0)) as (url, got):
        monkeypatch.setenv("http_proxy", url.replace("//", f"//ann:{SECRET}@"))
        assert quick().read("http://elsewhere.invalid/x.json") == b"whole"
        with pytest.raises(Refused, match="HTTP 407") as found:
            quick().read("http://elsewhere.invalid/x.json")
    assert SECRET not in str(found.value) and got[0].headers["Proxy-Authorization"]


@pytest.mark.parametrize("password", ["a/b", "a#b", "a?b", "a[b"])
def test_a_password_that_cuts_the_url_is_shown_how_to_spell(password):
    with pytest.raises(UserError, match="may not be read .* written %2F") as found:
        quick().read(f"http://ann:{SECRET}{password}{SECRET}@h/x.json")
    assert SECRET not in str(found.value)


@pytest.mark.parametrize("url", ["github://h/a.tar", "none://h/a.tar"])
def test_a_kind_of_source_that_cannot_be_opened_is_refused_at_once(url):
    clock = Clock()
    with pytest.raises(UserError, match="cannot be opened"):
        quick(clock).read(url)
    assert not clock.slept


@pytest.mark.parametrize("url", ["http://", "http://:x/a.tar", "http://h:99999/a.tar", "http://[::/a.tar"])
def test_what_is_no_url_is_refused_at_once(url):
    clock = Clock()
    with pytest.raises(UserError):
        quick(clock).read(url)
    assert not clock.slept
