"""Logs: a file per rank, appended for ever, and the console of rank 0. Tracebacks and native crashes go to the file too."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING

from dattrain.text import styled
from dattrain.urls import mask

_FORMAT = "%(asctime)s %(levelname).1s {who} %(name)s: %(message)s"
_CONSOLE = "%(message)s"


if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[IO[str]]
else:  # Python 3.10 has no such subscript
    _StreamHandler = logging.StreamHandler


class Console(_StreamHandler):
    """Log records and, on a terminal, one live line below them that is rewritten in place."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        super().__init__(stream or sys.stdout)
        self.interactive = bool(getattr(self.stream, "isatty", lambda: False)())
        self._live = ""
        self._drawn = 0.0

    def live(self, text: str) -> None:
        """Show ``text`` as the live line, at most five times a second; nothing where there is no terminal."""
        if self.interactive and time.monotonic() - self._drawn > 0.2:
            self._drawn = time.monotonic()
            self._live = text
            self._write(f"\r\x1b[K{text}")

    def clear(self) -> None:
        """Remove the live line."""
        if self._live:
            self._live = ""
            self._write("\r\x1b[K")

    def format(self, record: logging.LogRecord) -> str:
        """The line; warnings and errors coloured where there are colours, others by their ``style``."""
        level = (
            "error"
            if record.levelno >= logging.ERROR
            else "warning"
            if record.levelno >= logging.WARNING
            else ""
        )
        return styled(super().format(record), level or getattr(record, "style", ""), self.stream)

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record above the live line."""
        if self._live:
            self._write("\r\x1b[K")
        super().emit(record)
        if self._live:
            self._write(self._live)

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)
            self.stream.flush()


class _Masked(logging.Formatter):
    """What is logged, by other libraries too, shows no secrets of URLs."""

    def format(self, record: logging.LogRecord) -> str:
        return mask(super().format(record))


class RankLog:
    """Logs to ``run_dir/logs/rank_N.log`` (appended), and on rank 0 to the console, until ``close``.

    ``file`` is the open file, for stack dumps.
    """

    def __init__(self, run_dir: Path, rank: int, host: str) -> None:
        self.path = run_dir / "logs" / f"rank_{rank}.log"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.console: Console | None = None
        # A restart appends: what the attempt before it said is evidence.
        self.file: IO[str] = open(  # noqa: SIM115 (closed by close)
            self.path, "a", encoding="utf-8", errors="backslashreplace", buffering=1
        )
        to_file = logging.StreamHandler(self.file)
        to_file.setFormatter(_Masked(_FORMAT.format(who=f"r{rank}@{host}".replace("%", "%%"))))
        self._handlers: list[logging.Handler] = [to_file]
        if rank == 0:
            self.console = Console()
            self.console.setFormatter(_Masked(_CONSOLE))
            self.console.addFilter(_only_ours_or_warnings)
            self._handlers.append(self.console)
        root = logging.getLogger()
        self._level = root.level
        root.setLevel(logging.INFO)
        for handler in self._handlers:
            root.addHandler(handler)
        for name, level in _NOISY.items():
            logging.getLogger(name).setLevel(level)
        logging.captureWarnings(True)
        faulthandler.enable(self.file, all_threads=True)

    def close(self) -> None:
        """Remove the handlers and close the file; safe to call twice."""
        root = logging.getLogger()
        if self.console is not None:
            self.console.clear()
        for handler in self._handlers:
            with contextlib.suppress(OSError):  # a full disk: what ended the run is to be said, not this
                handler.flush()
            root.removeHandler(handler)
        self._handlers = []
        root.setLevel(self._level)
        logging.captureWarnings(False)
        if not self.file.closed:
            faulthandler.disable()
            with contextlib.suppress(OSError):
                self.file.close()


_NOISY = {
    "DeepSpeed": logging.WARNING,
    "deepspeed": logging.WARNING,
    "fsspec": logging.WARNING,
    "botocore": logging.WARNING,
    "matplotlib": logging.WARNING,
    "PIL": logging.WARNING,
    "torch.distributed": logging.WARNING,
}


def _only_ours_or_warnings(record: logging.LogRecord) -> bool:
    """Whether the console shows a record; not what whoever raised it will say (``extra={"console": False}``)."""
    ours = record.name.startswith("dattrain") or record.levelno >= logging.WARNING
    return ours and getattr(record, "console", True)
