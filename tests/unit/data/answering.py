"""An HTTP server on loopback whose answers a test writes, and a clock that sleeping moves."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from dattrain.data.source.hosts import Hosts

Answer = tuple[int, Mapping[str, str], bytes | Iterable[bytes]]


class Asked:
    """A request: its method, path, query string and headers."""

    def __init__(self, method: str, target: str, headers: Mapping[str, str]) -> None:
        self.method, self.headers = method, headers
        self.path, _, self.query = target.partition("?")
        self.name = self.path.rpartition("/")[2]


def file(folder: Path, asked: Asked, *, ranges: bool = True) -> Answer:
    """What a good server says."""
    path = folder / asked.path.lstrip("/")
    if not path.is_file():
        return 404, {}, b""
    data = path.read_bytes()
    found = re.match(r"bytes=(\d+)-(\d+)", asked.headers.get("Range", "")) if ranges else None
    if found:
        total = len(data)
        data = data[int(found[1]) : int(found[2]) + 1]
        return 206, {"Content-Range": f"bytes {found[1]}-{found[2]}/{total}"}, data
    return 200, {}, data


@contextmanager
def answering(answer: Callable[[Asked], Answer]):
    """URL of a server, and the requests that it got, in order. A body in pieces comes with its length in the headers."""
    got: list[Asked] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked = Asked(self.command, self.path, self.headers)
            got.append(asked)
            status, headers, body = answer(asked)
            pieces = [body] if isinstance(body, bytes) else body
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if isinstance(body, bytes) and "Content-Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with suppress(OSError):
                if self.command == "GET":
                    for piece in pieces:
                        self.wfile.write(piece)

        do_HEAD = do_GET

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except OSError:
                self.close_connection = True

        def log_message(self, *args) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}", got
    finally:
        http.shutdown()
        http.server_close()


class Clock:
    """Seconds that pass only where somebody sleeps; ``slept`` has each sleep."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []
        self.hosts = Hosts(lambda: self.now, self._sleep, lambda: self.now)

    def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
