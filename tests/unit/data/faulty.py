"""A plain HTTP server on loopback that goes wrong on demand, and small sets of shards to serve."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from dattrain.data.prepare.index_shards import index_shards
from dattrain.data.source import tar

FAULTS = ("refuse", "cut", "short", "long", "corrupt", "slow", "error", "whole")


def write_shards(
    folder: Path, *, shards: int, samples: int, seed: int = 0, size: int = 3000, index: bool = True
):
    """Shards of ``samples`` random byte strings called .jpg, with labels; returns {key: (bytes, label)}."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    content, paths = {}, []
    for shard in range(shards):
        path = folder / f"set-{shard:04d}.tar"
        with open(path, "wb") as file:
            for sample in range(samples):
                key = f"{shard:04d}{sample:04d}"
                data, label = draw.randbytes(draw.randint(size // 2, size)), draw.randint(0, 99)
                content[f"{path.name}:{key}"] = data, label
                for name, part in ((f"{key}.jpg", data), (f"{key}.cls", str(label).encode())):
                    file.write(tar.header(name, len(part)) + part + tar.padding(len(part)))
            file.write(tar.END)
        paths.append(str(path))
    if index:
        index_shards(paths, checksum=True)
    return content


class Server:
    """Serves a folder. ``faults``: what to do to the next requests for the bytes of a shard, in turn."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: list[str] = []
        self.injected: Counter[str] = Counter()
        self.served: Counter[str] = Counter()
        self.delay = 0.0
        self.stall = 1.5
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                path = outer.folder / self.path.lstrip("/")
                if not path.is_file():
                    self.send_response(404)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                data, status = path.read_bytes(), 200
                fault = outer.next_fault(path) if body else None
                ranges = self.headers.get("Range")
                if ranges and fault != "whole":
                    first, _, last = ranges.removeprefix("bytes=").partition("-")
                    if int(first) >= len(data):
                        self.send_response(416)
                        self.send_header("Content-Length", "0")
                        self.end_headers()
                        return
                    data, status = data[int(first) : int(last) + 1 if last else None], 206
                if body:
                    with outer.lock:
                        outer.served[path.name] += len(data)
                if fault == "error":
                    data, status = b"busy", 503
                elif fault == "short":
                    data = data[: len(data) // 2]
                elif fault == "long":
                    data = data + b"!"
                elif fault == "corrupt":
                    data = bytes([data[0] ^ 1]) + data[1:]
                if fault == "refuse":
                    self.close_connection = True
                    self.connection.close()
                    return
                if fault == "slow":
                    time.sleep(outer.stall)
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Accept-Ranges", "bytes")
                self.end_headers()
                if not body:
                    return
                if fault == "cut":
                    self.wfile.write(data[: len(data) // 2])
                    self.wfile.flush()
                    self.close_connection = True
                    self.connection.close()
                    return
                for at in range(0, len(data), 4096):
                    time.sleep(outer.delay)
                    self.wfile.write(data[at : at + 4096])

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except (ConnectionError, ValueError, OSError):
                    self.close_connection = True

            def finish(self) -> None:
                with suppress(ConnectionError, ValueError, OSError):
                    super().finish()

            def log_message(self, *args) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def next_fault(self, path: Path) -> str | None:
        with self.lock:
            if path.suffix != ".tar" or not self.faults:
                return None
            fault = self.faults.pop(0)
            self.injected[fault] += 1
            return fault


@contextmanager
def serving(folder: Path):
    """A running server, stopped at the end."""
    server = Server(folder)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
