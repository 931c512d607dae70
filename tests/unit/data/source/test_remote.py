"""Remote shards against real servers on loopback: an S3-compatible one, and an HTTP one that goes wrong on purpose."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from faulty import FAULTS, serving, write_shards

from dattrain.data.source.dataset import ShardDataset
from dattrain.data.source.disk_cache import Cache
from dattrain.data.source.download import Transfer
from dattrain.data.source.listing import expand_remote, parse_hub_info
from dattrain.data.source.remote import open_remote
from dattrain.errors import ConfigError, UserError

FORK = multiprocessing.get_context("fork")
SMALL = 64 * 1024


def quick(**changes) -> Transfer:
    return Transfer(
        **{"attempts": 8, "timeout": 1.0, "pause": 0.01, "longest_pause": 0.05, "block": SMALL, **changes}
    )


def opened(
    url: str, cache: Path, *, limit: float = 1e9, transfer: Transfer | None = None, **more
) -> ShardDataset:
    shards, source = open_remote(
        url, cache_dir=str(cache), cache_gb=limit / 1e9, transfer=transfer or quick(), **more
    )
    return ShardDataset(url, shards, source)


def check_all(dataset: ShardDataset, content, order=None) -> None:
    places = [(s, i) for s, n in enumerate(dataset.counts) for i in range(n)]
    if order is not None:
        order.shuffle(places)
    seen = {}
    for shard, sample in places:
        found = dataset.read(shard, sample)
        assert found.key not in seen
        seen[found.key] = found.data, found.label
    assert seen == content


@contextmanager
def watched(cache: Path, limit: int):
    """Look at the cache's size all the time."""
    largest, stop = [0], threading.Event()
    view = Cache(cache, limit)

    def watch() -> None:
        while not stop.is_set():
            largest[0] = max(largest[0], view.used())
            time.sleep(0.002)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield largest
    stop.set()
    thread.join()
    assert 0 < largest[0] <= limit


def test_a_set_is_read_whole_through_a_cache_smaller_than_it(tmp_path):
    content = write_shards(tmp_path / "set", shards=6, samples=20)
    limit = int(2.5 * (tmp_path / "set" / "set-0000.tar").stat().st_size)
    with serving(tmp_path / "set") as server, watched(tmp_path / "cache", limit):
        dataset = opened(server.url, tmp_path / "cache", limit=limit, verify=True)
        assert dataset.max_label == max(label for _, label in content.values())
        for _ in range(2):
            check_all(dataset, content)
        dataset.close()


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_survived(tmp_path, fault):
    content = write_shards(tmp_path / "set", shards=1, samples=60)
    with serving(tmp_path / "set") as server:
        dataset = opened(server.url, tmp_path / "cache")
        server.faults = [fault, "none", fault] if fault != "corrupt" else [fault]
        check_all(dataset, content)
        assert server.injected[fault] >= 1
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_server_that_starts_late(tmp_path):
    content = write_shards(tmp_path / "set", shards=1, samples=5)
    with serving(tmp_path / "set") as server:
        url, port = server.url, server.http.server_address[1]
        dataset = opened(url, tmp_path / "cache")
    from http.server import ThreadingHTTPServer

    def late() -> None:
        time.sleep(0.5)
        back = ThreadingHTTPServer(("127.0.0.1", port), server.http.RequestHandlerClass)
        back.daemon_threads = True
        threading.Thread(target=back.serve_forever, daemon=True).start()
        servers.append(back)

    servers: list[ThreadingHTTPServer] = []
    thread = threading.Thread(target=late)
    thread.start()
    dataset.source.transfer.longest_pause = 0.5
    check_all(dataset, content)
    thread.join()
    servers[0].shutdown()
    servers[0].server_close()


@pytest.mark.parametrize("loops", [50])
def test_fifty_faults_lose_and_double_nothing(tmp_path, loops):
    content = write_shards(tmp_path / "set", shards=8, samples=60, size=6000)
    limit = int(3.2 * max(p.stat().st_size for p in (tmp_path / "set").glob("*.tar")))
    draw = random.Random(1)
    kinds = [f for f in FAULTS if f != "slow"]
    with serving(tmp_path / "set") as server, watched(tmp_path / "cache", limit):
        dataset = opened(server.url, tmp_path / "cache", limit=limit, transfer=quick(attempts=20))
        # "corrupt" is met by fetching a shard once more, so two in one shard are one too many: they are spaced out.
        plan = [draw.choice(kinds[:4] + kinds[5:]) for _ in range(loops - 5)] + ["slow"] * 2
        draw.shuffle(plan)
        server.faults = [word for fault in plan for word in (fault, "none")]
        for at in (10, 60, 100):
            server.faults.insert(min(at, len(server.faults)), "corrupt")
        turns = 0
        while server.faults:
            dataset.prefetch(draw.sample(range(8), 3))
            check_all(dataset, content, None)
            turns += 1
        assert sum(n for fault, n in server.injected.items() if fault != "none") == loops
        dataset.close()


def test_a_shard_that_stays_wrong_is_refused(tmp_path):
    write_shards(tmp_path / "set", shards=1, samples=40)
    path = tmp_path / "set" / "set-0000.tar"
    with serving(tmp_path / "set") as server:
        dataset = opened(server.url, tmp_path / "cache", transfer=quick(attempts=3))
        whole = path.read_bytes()
        for changed, words in (
            (whole[:-512], "has .* bytes, but its index was built for"),
            (whole + bytes(512), "has .* bytes, but its index was built for"),
            (whole[:700] + b"\x00\x01\x02" + whole[703:], "SHA-256"),
        ):
            path.write_bytes(changed)
            with pytest.raises(UserError, match=rf"set-0000\.tar.*{words}"):
                dataset.read(0, 0)
            assert not [p for p in (tmp_path / "cache").iterdir() if p.name.endswith((".tar", ".part"))]
        path.write_bytes(whole[:-1024])
        with pytest.raises(UserError, match="index was built for"):
            opened(server.url, tmp_path / "other", verify=True)
        path.unlink()
        with pytest.raises(UserError, match="no such file"):
            dataset.read(0, 0)


@pytest.mark.parametrize("block, then", [(1 << 20, 1 << 19), (1 << 18, 1 << 18), (1 << 16, 1 << 16)])
def test_a_block_that_ran_out_of_time_is_halved_down_to_256_kib_and_never_grows(block, then):
    asked = []

    class Slow(Transfer):
        def _range(self, url, start, end, whole=None, version=None):
            asked.append(end - start)
            if len(asked) == 1:
                raise TimeoutError
            return bytes(min(end, 8 << 20) - start)

    fd = os.memfd_create("shard")
    Slow(attempts=2, pause=0.0, block=block).download("s3://bucket/shard.tar", fd, 8 << 20)
    os.close(fd)
    assert asked[:3] == [block, then, then]


@pytest.mark.parametrize("suffix", [".tar", ".index.npz"])
def test_what_was_damaged_in_the_cache_is_fetched_anew(tmp_path, suffix):
    content = write_shards(tmp_path / "set", shards=1, samples=4)
    with serving(tmp_path / "set") as server:
        for cut in (False, True):
            if cut:
                (damaged,) = (p for p in (tmp_path / "cache").iterdir() if p.name.endswith(suffix))
                damaged.write_bytes(damaged.read_bytes()[:-700])
            assert (
                opened(server.url, tmp_path / "cache").read(0, 3).data == content["set-0000.tar:00000003"][0]
            )
        (damaged,) = (p for p in (tmp_path / "cache").iterdir() if p.name.endswith(suffix))
        damaged.unlink()
        os.mkfifo(damaged)
        with pytest.raises(UserError, match="cannot be read .it is a FIFO"):
            opened(server.url, tmp_path / "cache").read(0, 0)


def test_a_source_that_cannot_be_reached(tmp_path):
    with serving(tmp_path) as server:
        url = server.url
    with pytest.raises(UserError, match="could not be read in 2 attempts"):
        opened(url, tmp_path / "cache", transfer=quick(attempts=2))


def test_prefetch_reads_in_the_background_within_the_bound(tmp_path):
    write_shards(tmp_path / "set", shards=6, samples=20)
    largest = max(p.stat().st_size for p in (tmp_path / "set").glob("*.tar"))
    limit = int(3.5 * largest)
    with serving(tmp_path / "set") as server, watched(tmp_path / "cache", limit):
        dataset = opened(server.url, tmp_path / "cache", limit=limit)
        source = dataset.source
        dataset.prefetch([4, 1, 5, 0])
        deadline = time.monotonic() + 20
        while not all(source.name(s) in source.cache for s in (4, 1, 5)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.2)
        # The fourth has no room beside those that are needed before it.
        assert source.name(0) not in source.cache
        before = sum(server.served.values())
        source.read(4, 0, 512), source.read(1, 0, 512)
        assert sum(server.served.values()) == before
        dataset.prefetch([0, 4, 1])
        while source.name(0) not in source.cache:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert source.name(5) not in source.cache and source.name(4) in source.cache
        dataset.close()


def _read_all(url, cache, limit, content, seed, results):
    # A request that runs out of time is sent again, so here none may.
    dataset = opened(url, cache, limit=limit, transfer=quick(timeout=60.0))
    check_all(dataset, content, random.Random(seed))
    results.put(seed)


def test_processes_of_a_node_share_one_cache(tmp_path):
    content = write_shards(tmp_path / "set", shards=4, samples=20)
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "set").glob("*.tar")}
    with serving(tmp_path / "set") as server:
        server.delay = 0.001
        results = FORK.Queue()
        arguments = (server.url, tmp_path / "cache", 1e9, content)
        workers = [FORK.Process(target=_read_all, args=(*arguments, i, results)) for i in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert [w.exitcode for w in workers] == [0] * 3 and results.qsize() == 3
        # Each shard crossed the network once.
        assert {n: b for n, b in server.served.items() if n.endswith(".tar")} == sizes


def transfers(cache: Path) -> set[tuple[str, int]]:
    """Files being written, told from those that a killed process left by the time of their last change."""
    found = set()
    for path in cache.glob("*.part"):
        with suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_mtime_ns))
    return found


@pytest.mark.parametrize("kills", [6, pytest.param(50, marks=pytest.mark.full)])
def test_a_killed_process_leaves_nothing_that_is_believed(tmp_path, kills):
    content = write_shards(tmp_path / "set", shards=4, samples=20)
    biggest = max(p.stat().st_size for p in (tmp_path / "set").glob("*.tar"))
    limit = int(2.2 * biggest)
    draw = random.Random(kills)
    halves = 0
    with serving(tmp_path / "set") as server:
        server.delay = 0.01
        for kill in range(kills):
            worker = FORK.Process(
                target=_read_all, args=(server.url, tmp_path / "cache", limit, content, kill, FORK.Queue())
            )
            before = transfers(tmp_path / "cache")
            worker.start()
            if kill % 2:
                time.sleep(draw.uniform(0.15, 0.5))
            else:  # in a transfer, however fast or slow the machine is
                while worker.is_alive() and not transfers(tmp_path / "cache") - before:
                    time.sleep(0.001)
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()
            halves += len(list((tmp_path / "cache").glob("*.part")))
            for path in (tmp_path / "cache").glob("*.tar"):
                assert path.read_bytes() == (tmp_path / "set" / path.name.partition("-")[2]).read_bytes()
            assert Cache(tmp_path / "cache", limit).used() <= limit
        assert halves > 0, "no kill hit a transfer"
        server.delay = 0
        check_all(opened(server.url, tmp_path / "cache", limit=limit), content)
        assert not list((tmp_path / "cache").glob("*.part"))


def test_a_forked_worker_reads_while_the_parent_fetches(tmp_path):
    content = write_shards(tmp_path / "set", shards=4, samples=20)
    with serving(tmp_path / "set") as server:
        server.delay = 0.005
        dataset = opened(server.url, tmp_path / "cache")
        dataset.prefetch([0, 1, 2, 3])
        time.sleep(0.1)

        def work() -> None:
            check_all(dataset, content)

        worker = FORK.Process(target=work)
        worker.start()
        worker.join(60)
        assert worker.exitcode == 0
        check_all(dataset, content)
        dataset.close()


def test_what_is_beside_the_shards(tmp_path):
    content = write_shards(tmp_path / "set", shards=3, samples=4)
    folder = tmp_path / "set"
    with serving(folder) as server:
        pattern = server.url + "/set-{0000..0002}.tar"
        (folder / "_catalogue.json").rename(tmp_path / "away.json")
        check_all(opened(pattern, tmp_path / "a"), content)  # from the indexes of the shards
        for path in folder.glob("*.npz"):
            path.unlink()
        with pytest.raises(UserError, match=r"set-000\d\.tar.*neither _catalogue\.json nor _info\.json"):
            opened(pattern, tmp_path / "b")
        names = [f"set-{i:04d}.tar" for i in range(3)]
        (folder / "_info.json").write_text(
            '{"name": "x", "splits": {"train": {"name": "train", "num_samples": 12, "filenames": '
            f'{names!r}, "shard_lengths": [4, 4, 4]}}}}}}'.replace("'", '"')
        )
        check_all(opened(pattern, tmp_path / "c"), content)  # from timm's, and indexes made here
        assert expand_remote(f"{server.url}/set-0002.tar::{server.url}/set-0000.tar", quick()) == [
            f"{server.url}/set-0002.tar",
            f"{server.url}/set-0000.tar",
        ]
        (folder / "list.txt").write_text("# shards\nset-0001.tar\n")
        assert expand_remote(f"{server.url}/list.txt", quick()) == [f"{server.url}/set-0001.tar"]
        with pytest.raises(UserError, match="no such shard"):
            opened(server.url + "/none-{0..1}.tar", tmp_path / "d")


def test_hub_info_that_says_something_else():
    with pytest.raises(UserError, match="how many samples"):
        parse_hub_info(
            b'{"splits": {"train": {"filenames": ["a.tar"], "shard_lengths": []}}}', "x/_info.json"
        )


def test_settings_that_cannot_work(tmp_path):
    write_shards(tmp_path / "set", shards=1, samples=20)
    with serving(tmp_path / "set") as server:
        with pytest.raises(ConfigError, match="data.cache_dir"):
            open_remote(server.url, cache_dir=None, cache_gb=1, transfer=quick())
        with pytest.raises(ConfigError, match="does not hold the largest shard"):
            opened(server.url, tmp_path / "cache", limit=1000)
    with pytest.raises(UserError, match="nosuch://bucket"):
        opened("nosuch://bucket/a-{0..1}.tar", tmp_path / "cache")


@pytest.fixture
def s3(monkeypatch):
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield f"http://{host}:{port}"
    server.stop()


def test_an_s3_compatible_server(tmp_path, s3):
    import s3fs

    content = write_shards(tmp_path / "set", shards=3, samples=20)
    files = s3fs.S3FileSystem(skip_instance_cache=True)
    files.mkdir("bucket")
    for path in (tmp_path / "set").iterdir():
        files.put_file(str(path), f"bucket/sets/{path.name}")
    transfer = quick(timeout=20.0, attempts=3)
    for spec in (
        "s3://bucket/sets",
        "s3://bucket/sets/set-{0000..0002}.tar",
        "s3://bucket/sets/set-*.tar",
        "s3://bucket/sets/set-000?.tar",
    ):
        dataset = opened(spec, tmp_path / "cache", transfer=transfer, verify=True)
        check_all(dataset, content)
    files.rm("bucket/sets/_catalogue.json")
    files.pipe_file("bucket/sets/val-0000.tar", b"x")
    with pytest.raises(UserError, match="several sets"):
        opened("s3://bucket/sets", tmp_path / "cache", transfer=transfer)
    files.pipe_file("bucket/sets/set-0001.tar", b"x" * 1024)
    with pytest.raises(UserError, match="index was built for"):
        opened("s3://bucket/sets/set-{0000..0002}.tar", tmp_path / "new", transfer=transfer, verify=True)
    dataset = opened("s3://bucket/sets/set-{0000..0002}.tar", tmp_path / "new", transfer=transfer)
    with pytest.raises(UserError, match=r"s3://bucket/sets/set-0001\.tar: has 1024 bytes"):
        dataset.read(1, 0)
