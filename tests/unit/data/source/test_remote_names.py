"""URLs with a query string or a password, lists of URLs, and what lies beside shards: whole, absent, refused, or not what it
should be."""

from __future__ import annotations

import io
import json
import os
import time

import numpy as np
import pytest
from answering import Clock, answering, file
from faulty import write_shards

from dattrain.cli import main as cli
from dattrain.data.source.dataset import ShardDataset, open_dataset
from dattrain.data.source.download import Refused, Transfer
from dattrain.data.source.listing import expand_remote, is_remote
from dattrain.data.source.remote import open_remote
from dattrain.errors import UserError

SECRET = "hunter2%2Fand+more%3D"
QUERY = f"X-Amz-Credential=a%2Fb&X-Amz-Signature={SECRET}"


def quick() -> Transfer:
    return Transfer(attempts=2, timeout=5.0, pause=0.0, hosts=Clock().hosts)


def opened(spec: str, cache, **more) -> ShardDataset:
    shards, source = open_remote(spec, cache_dir=str(cache), cache_gb=0.1, transfer=quick(), **more)
    return ShardDataset("set", shards, source)


def content_of(dataset: ShardDataset):
    samples = [dataset.read(s, i) for s, n in enumerate(dataset.counts.tolist()) for i in range(n)]
    return {sample.key: (sample.data, sample.label) for sample in samples}


@pytest.fixture
def content(tmp_path):
    return write_shards(tmp_path / "set", shards=3, samples=4)


class TestQueryStrings:
    @pytest.mark.parametrize(
        "names", ["set-{0000..0002}.tar", "list.txt", "", "set-0000.tar::set-{0001..0002}.tar"]
    )
    def test_of_a_folder_go_with_every_request_as_they_were_given(self, tmp_path, content, names):
        (tmp_path / "set" / "list.txt").write_text("\ufeffset-0000.tar\r\n# no\n\nset-0001.tar\nset-0002.tar")

        def answer(asked):
            return file(tmp_path / "set", asked) if asked.query == QUERY else (403, {}, b"")

        with answering(answer) as (url, got):
            spec = "::".join(f"{url}/{name}?{QUERY}" for name in names.split("::"))
            dataset = opened(spec, tmp_path / "cache", verify=True)
            assert content_of(dataset) == content
            assert dataset.shards.paths == tuple(f"{url}/set-000{i}.tar" for i in range(3))
            asked = len(got)
            # A new signature is no new shard.
            again = opened(spec, tmp_path / "cache")
            assert content_of(again) == content and not [a for a in got[asked:] if a.name.endswith("tar")]
        assert not [name for name in os.listdir(tmp_path / "cache") if "?" in name or "Amz" in name]

    def test_of_single_files_need_a_catalogue_beside_their_list(self, tmp_path, content):
        """As S3 signs: for one file and one method."""

        def answer(asked):
            good = asked.method == "GET" and asked.query == f"sig={asked.name[-8:-4]}"
            return file(tmp_path / "set", asked) if good else (403, {}, b"")

        with answering(answer) as (url, _):
            lines = [f"{url}/set-{i:04d}.tar?sig={i:04d}" for i in range(3)]
            (tmp_path / "list.txt").write_text("\n".join(lines))
            with pytest.raises(UserError, match=r"beside a \.txt list .*HTTP 403") as found:
                opened(str(tmp_path / "list.txt"), tmp_path / "cache")
            assert "pickle" not in str(found.value) and "sig=" not in str(found.value)
            (tmp_path / "set" / "_catalogue.json").rename(tmp_path / "_catalogue.json")
            dataset = open_dataset(
                str(tmp_path / "list.txt"), cache_dir=str(tmp_path / "cache"), cache_gb=0.1, verify=True
            )
            assert content_of(dataset) == content

    def test_that_alone_tell_shards_apart_are_refused(self, tmp_path, content):
        with (
            answering(lambda asked: file(tmp_path / "set", asked)) as (url, _),
            pytest.raises(UserError, match="named twice with different query strings"),
        ):
            opened(f"{url}/set-0000.tar?part=1::{url}/set-0000.tar?part=2", tmp_path / "cache")

    def test_of_a_pattern_that_needs_a_listing_are_refused(self):
        with pytest.raises(UserError, match="with braces"):
            expand_remote(f"https://127.0.0.1:1/set-*.tar?{QUERY}", quick())


class TestLists:
    @pytest.mark.parametrize("second", ["", "./", "../{folder}/"])
    def test_that_name_a_shard_twice_are_refused(self, tmp_path, content, second):
        """Its samples would be seen twice an epoch."""
        lines = ["set-0000.tar", f"{second.format(folder='set')}set-0000.tar"]
        (tmp_path / "set" / "list.txt").write_text("\n".join(lines))
        with answering(lambda asked: file(tmp_path, asked)) as (url, _):
            for spec in (f"{url}/set/list.txt", f"{url}/set/set-{{0000..0001}}.tar::{url}/set/set-0000.tar"):
                with pytest.raises(UserError, match=r"set-0000\.tar: is named twice$"):
                    opened(spec, tmp_path / "cache")

    def test_of_urls_are_remote_whether_local_or_not(self, tmp_path, content):
        with answering(lambda asked: file(tmp_path / "set", asked)) as (url, _):
            lines = [f"{url}/set-000{i}.tar" for i in range(3)]
            for name in ("list.txt", "set/list.txt"):
                (tmp_path / name).write_text("\n".join(lines))
            for spec in (str(tmp_path / "list.txt"), f"{url}/list.txt", "::".join(lines)):
                assert is_remote(spec) and expand_remote(spec, quick()) == lines
            assert content_of(opened(str(tmp_path / "list.txt"), tmp_path / "cache")) == content

    def test_with_names_stay_local(self, tmp_path, content):
        (tmp_path / "set" / "list.txt").write_text("set-0001.tar\n")
        spec = str(tmp_path / "set" / "list.txt")
        assert not is_remote(spec) and open_dataset(spec).counts.tolist() == [4]

    @pytest.mark.parametrize("lines", [["https://h/a.tar", "b.tar"], ["b.tar", "s3://h/a.tar"]])
    def test_that_mix_the_two_are_refused(self, tmp_path, lines):
        (tmp_path / "list.txt").write_text("\n".join(lines))
        with pytest.raises(UserError, match=r"'b\.tar' is local"):
            open_dataset(str(tmp_path / "list.txt"))
        with pytest.raises(UserError, match=r"b\.tar is local and the rest is remote"):
            open_dataset("::".join(lines))

    def test_of_something_else_are_refused(self, tmp_path):
        (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00https://")
        (tmp_path / "empty.txt").write_bytes(b"# nothing\n")
        with answering(lambda asked: file(tmp_path, asked)) as (url, _):
            for name, words in (("bytes", "UTF-8"), ("empty", "no shards there"), ("none", "no such list")):
                with pytest.raises(UserError, match=words):
                    expand_remote(f"{url}/{name}.txt", quick())


@pytest.mark.parametrize(
    "pattern", ["set-000?.tar", "set-000[0-2].tar", "s??-*.tar", "set-{0000,000[12]}.tar"]
)
def test_wildcards_of_each_kind_are_looked_up(tmp_path, content, pattern):
    def answer(asked):
        links = "".join(f'<a href="{name}">{name}</a>' for name in sorted(os.listdir(tmp_path / "set")))
        if asked.path == "/":
            return 200, {"Content-Type": "text/html"}, links.encode()
        return file(tmp_path / "set", asked)

    with answering(answer) as (url, _):
        assert expand_remote(f"{url}/{pattern}", quick()) == [f"{url}/set-000{i}.tar" for i in range(3)]


@pytest.mark.parametrize(
    "pattern", ["set-*.tar", "set-000?.tar", "set-{0000,000[12]}.tar", "set-{0000,0001,000[2]}.tar"]
)
def test_a_wildcard_does_not_pass_over_what_the_catalogue_has(tmp_path, content, pattern):
    def answer(asked):
        links = "".join(f'<a href="{name}">{name}</a>' for name in os.listdir(tmp_path / "set"))
        return (200, {}, links.encode()) if asked.path == "/" else file(tmp_path / "set", asked)

    (tmp_path / "set" / "set-0001.tar").unlink()
    with answering(answer) as (url, _), pytest.raises(UserError, match=r"set-0001\.tar: (in its|there is)"):
        opened(f"{url}/{pattern}", tmp_path / "cache", verify=True)


@pytest.mark.parametrize(
    "change, words", [("gone", r"set-0001\.tar: in its _catalogue"), ("new", "set-0009")]
)
def test_a_bucket_is_compared_with_its_catalogue(tmp_path, content, change, words, monkeypatch):
    known = (tmp_path / "set" / "_catalogue.json").read_bytes()
    held = {"set-0000.tar": 1, "set-0001.tar": 1, "set-0002.tar": 1}
    held = {**held, "set-0009.tar": 1} if change == "new" else {k: v for k, v in held.items() if "1" not in k}
    holding = Holding({"_catalogue.json": known})
    monkeypatch.setattr(holding, "listing", lambda url: held)
    with pytest.raises(UserError, match=words):
        open_remote("s3://bucket/set/", cache_dir=str(tmp_path), cache_gb=1, transfer=holding)


@pytest.mark.parametrize("status", [404, 403, 500])
@pytest.mark.parametrize("names", ["", "set-*.tar", "set-{0000..0001}.tar", "list.txt"])
def test_a_place_where_nothing_is_gives_one_line(tmp_path, status, names):
    with answering(lambda asked: (status, {}, b"")) as (url, _), pytest.raises(UserError) as found:
        opened(f"{url.replace('//', '//ann:hunter2@')}/{names}", tmp_path)
    assert "hunter2" not in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize("verify", [True, False])
def test_a_shard_that_is_gone_is_named(tmp_path, content, verify):
    (tmp_path / "set" / "set-0001.tar").unlink()
    with (
        answering(lambda asked: file(tmp_path / "set", asked)) as (url, _),
        pytest.raises(UserError, match=r"set-0001\.tar: there is no such"),
    ):
        content_of(opened(f"{url}/set-{{0000..0002}}.tar", tmp_path / "cache", verify=verify))


def test_a_bucket_that_may_not_be_listed_says_forbidden_of_what_is_not_there(tmp_path, content):
    (tmp_path / "set" / "_catalogue.json").unlink()

    def answer(asked):
        found = file(tmp_path / "set", asked)
        return found if found[0] < 400 else (403, {}, b"")

    with answering(answer) as (url, _):
        assert content_of(opened(f"{url}/set-{{0000..0002}}.tar", tmp_path / "cache")) == content


def catalogue(**entry) -> bytes:
    whole = {"samples": 4, "size": 4096, "sha256": "", "max_label": 1, **entry}
    return json.dumps({"format": 1, "shards": {"set-0000.tar": whole}}).encode()


def npz(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def hub(lengths) -> bytes:
    return json.dumps(
        {"splits": {"train": {"filenames": ["set-0000.tar"], "shard_lengths": lengths}}}
    ).encode()


STRANGE = {
    "html": ("_catalogue.json", b"<!doctype html><title>Not found"),
    "bytes": ("_catalogue.json", b"\xff\xfe\x00"),
    "deep": ("_catalogue.json", b"[" * 100_000),
    "infinite": ("_catalogue.json", catalogue(samples=float("inf"))),
    "huge": ("_catalogue.json", catalogue(size=10**30)),
    "negative": ("_catalogue.json", catalogue(samples=-1)),
    "list": ("_catalogue.json", b"[1]"),
    "hub html": ("_info.json", b"<html>"),
    "hub infinite": ("_info.json", hub([float("inf")])),
    "hub huge": ("_info.json", hub([10**30])),
    "index html": ("set-0000.index.npz", b"<html>"),
    "index empty": ("set-0000.index.npz", b""),
    "index pickle": ("set-0000.index.npz", b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00\x8c\x01a."),
    "index array": ("set-0000.index.npz", b"\x93NUMPY\x01\x00v\x00" + b" " * 118),
    "index objects": ("set-0000.index.npz", npz(format=np.array([{}], dtype=object))),
    "index vectors": ("set-0000.index.npz", npz(format=np.array([1, 1]))),
    "index cut": ("set-0000.index.npz", npz(format=np.int64(1), offsets=np.arange(9))[:200]),
}


class Holding(Transfer):
    """Reads what it was given."""

    def __init__(self, files) -> None:
        super().__init__()
        self.files = files

    def read(self, url):
        name = url.partition("?")[0].rpartition("/")[2]
        if name not in self.files:
            raise FileNotFoundError(url)
        return self.files[name]

    def size(self, url):
        return 4096


@pytest.mark.parametrize("kind", STRANGE)
def test_what_lies_beside_shards_is_read_or_refused_by_name(kind, tmp_path):
    name, data = STRANGE[kind]
    with pytest.raises(UserError) as found:
        open_remote(
            "https://ann:hunter2@h/set-{0000..0000}.tar?sig=hunter2",
            cache_dir=str(tmp_path),
            cache_gb=1,
            transfer=Holding({name: data}),
        )
    said = str(found.value)
    assert "https://***@h/set-0000" in said or f"https://***@h/{name}" in said
    assert "hunter2" not in said and "unsafe" not in said and "allow_pickle=True" not in said


def test_an_index_that_is_none_is_not_kept(tmp_path, content):
    folder, good = tmp_path / "set", (tmp_path / "set" / "set-0000.index.npz").read_bytes()
    with answering(lambda asked: file(folder, asked)) as (url, _):
        dataset = opened(f"{url}/set-{{0000..0000}}.tar", tmp_path / "cache")
        (folder / "set-0000.index.npz").write_bytes(b"<html>")
        with pytest.raises(UserError, match="not a readable index"):
            dataset.read(0, 0)
        (folder / "set-0000.index.npz").write_bytes(good)
        assert len(content_of(dataset)) == 4


class TestVerbs:
    @pytest.mark.parametrize("verb", ["ls", "verify", "stats", "pack"])
    def test_read_remote_shards_into_a_cache(self, tmp_path, shards, capsys, verb):
        with answering(lambda asked: file(shards, asked)) as (url, _):
            spec = f"{url.replace('//', '//ann:hunter2@')}/?sig=hunter2"
            more = [str(tmp_path / "out")] if verb == "pack" else []
            jobs = [] if verb == "ls" else ["--jobs", "1"]
            asked = ["data", verb, spec, *more, *jobs]
            assert cli.main(asked) == 2
            assert "--cache-dir" in capsys.readouterr().err
            assert cli.main([*asked, "--cache-dir", str(tmp_path / "cache")]) == 0
            told = capsys.readouterr()
            assert told.out and "hunter2" not in told.out + told.err
        for path in tmp_path.rglob("*"):
            assert not path.is_file() or b"hunter2" not in path.read_bytes()

    @pytest.mark.parametrize("spec", ["s3://bucket/set", "https://ann:hunter2@h/set-{0..1}.tar"])
    def test_index_says_where_it_works(self, capsys, spec):
        assert cli.main(["data", "index", spec]) == 1
        said = capsys.readouterr().err
        assert "run this where they are" in said and "hunter2" not in said


@pytest.fixture
def shards(tmp_path, jpegs):
    from pictures import write_tar

    from dattrain.data.prepare.index_shards import index_shards

    folder = tmp_path / "images"
    folder.mkdir()
    members = [(f"{i}.{x}", d) for i, j in enumerate(jpegs[:3]) for x, d in (("jpg", j), ("cls", b"1"))]
    write_tar(folder / "set-0000.tar", members)
    index_shards([str(folder / "set-0000.tar")])
    return folder


def test_prefetching_shows_no_secrets(tmp_path, content, caplog):
    with answering(lambda asked: file(tmp_path / "set", asked)) as (url, _):
        dataset = opened(f"{url}/set-{{0000..0002}}.tar?sig=hunter2", tmp_path / "cache")

        def refuse(url, *_):
            raise Refused(f"{url}: may not be read")

        dataset.source.transfer.download = refuse
        dataset.prefetch([0])
        deadline = time.monotonic() + 10
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.01)
        dataset.close()
    assert "set-0000.tar" in caplog.text and "hunter2" not in caplog.text
