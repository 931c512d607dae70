"""Where numbers go first: ``metrics.jsonl``, one object per line. Rank 0 writes; ``loggers`` get them after it."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dattrain.files import reason, write_atomically

Row = Mapping[str, Any]

FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"
REPLACED = "metrics.replaced.jsonl"
"""Rows that a later start has trained anew, in the order in which they were taken out of ``FILE``."""

log = logging.getLogger(__name__)


def read(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run, oldest first; a line that a kill cut off is left out."""
    path = run_dir / FILE
    return parse(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else []


def parse(text: str) -> list[dict[str, Any]]:
    """The rows of some of ``FILE``; lines that were cut short are left out."""
    rows = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


class Metrics:
    """Writes rows, each flushed at once.

    A disk that takes none for a while ends no training: they follow when it does, and whether training can do without is
    decided by the next save.

    Args:
        run_dir: the run folder.
        step: the update that training resumes from. Rows of later ones (a killed process trained further than its last
            checkpoint, or checkpoints were lost) are moved to ``metrics.replaced.jsonl``, so the curve is that of an
            undisturbed run; where it starts over, the TensorBoard folder is renamed too.

    Attributes:
        rows: those up to ``step``.
        logged: the last update that an attempt before this one had written down; ``step`` where it starts over.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        self.path = run_dir / FILE
        self.rows, replaced = rewind(self.path, step)
        self.logged = max([step, *(row["step"] for row in replaced if step)])
        if replaced:
            _report_replaced(run_dir, step, replaced)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._failing = False

    def write(self, row: Row, *, durable: bool = False) -> None:
        """Append ``row``, and flush all to the disk if ``durable``. Numbers that are not finite become null, which JSON can hold."""
        try:
            self._file.write(json.dumps(_finite(row), separators=(", ", ": ")) + "\n")
            self._file.flush()
            if durable:
                os.fsync(self._file.fileno())
            self._failing = False
        except OSError as error:
            if not self._failing:
                log.warning("%s cannot be written (%s); training continues", self.path, reason(error))
            self._failing = True

    def close(self) -> None:
        """Flush to the disk and close."""
        try:
            if not self._file.closed:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
        except OSError as error:
            log.warning("the last rows of %s could not be written (%s)", self.path, reason(error))


def rewind(path: Path, step: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Move every row after ``step`` to ``REPLACED`` and drop lines cut short; returns the rows kept and those moved.

    Atomic: a process killed in between leaves a row in both files, never in none.
    """
    rows = read(path.parent)
    kept = [row for row in rows if row.get("step", 0) <= step]
    replaced = [row for row in rows if row.get("step", 0) > step]
    if replaced:
        with open(path.with_name(REPLACED), "a", encoding="utf-8") as file:
            file.write(_text(replaced))
            file.flush()
            os.fsync(file.fileno())
    text = _text(kept)
    if not path.exists() or path.read_text(encoding="utf-8", errors="replace") != text:
        write_atomically(path, text, durable=True)
    return kept, replaced


def _report_replaced(run_dir: Path, step: int, replaced: Sequence[Row]) -> None:
    """Say which rows were moved; where training starts over, give TensorBoard's folder another name."""
    first, last = (pick(row["step"] for row in replaced) for pick in (min, max))
    if step:
        log.info(
            "resuming from step %d: the rows of steps %d to %d in %s are moved to %s",
            step, first, last, FILE, REPLACED,
        )  # fmt: skip
        return
    events, also = run_dir / TENSORBOARD, ""
    if events.exists():
        free = next(
            path for n in itertools.count(1) if not (path := run_dir / f"{TENSORBOARD}.replaced-{n}").exists()
        )
        os.rename(events, free)
        also = f", and {TENSORBOARD}/ is now {free.name}/"
    log.warning(
        "%s has rows up to step %d, but there is no checkpoint of any: starting from step 0; its rows are moved to %s%s",
        FILE, last, REPLACED, also,
    )  # fmt: skip


def _text(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row, separators=(", ", ": ")) + "\n" for row in rows)


def last(rows: Iterable[Row], key: str) -> Row | None:
    """The last row that has ``key``."""
    found = None
    for row in rows:
        if key in row:
            found = row
    return found


def key_of(metric: str) -> str:
    """``checkpoint.metric`` as rows of evaluations name it: ``loss`` is training's there."""
    return "eval_loss" if metric == "loss" else metric


def scores(rows: Iterable[Mapping[str, Any]], metric: str) -> dict[int, float]:
    """``checkpoint.metric`` by step, of the evaluations among ``rows`` that have it as a number."""
    key = key_of(metric)
    return {row["step"]: row[key] for row in rows if isinstance(row.get(key), (int, float))}


def _finite(row: Row) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
