"""Where numbers go: ``metrics.jsonl`` first, one object per line, and TensorBoard as a sink beside it. Rank 0 writes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"


def read(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run, oldest first; a line that a kill cut off is left out."""
    path = run_dir / FILE
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows


class Metrics:
    """Writes rows, each flushed at once.

    Args:
        run_dir: the run folder.
        step: the update that training goes on from. Rows of later ones (a killed process trained further than its last
            checkpoint) are removed, so the curve is that of an undisturbed run.
        tensorboard: write the TensorBoard sink as well.
    """

    def __init__(self, run_dir: Path, step: int, *, tensorboard: bool = True) -> None:
        self.path = run_dir / FILE
        self.rows = rewind(self.path, step)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run_dir / TENSORBOARD), purge_step=step + 1)

    def write(self, row: Row) -> None:
        """Append ``row``. Numbers that are not finite become null, which JSON can hold."""
        self._file.write(json.dumps(_finite(row), separators=(", ", ": ")) + "\n")
        self._file.flush()

    def scalars(self, prefix: str, row: Row, step: int) -> None:
        """Hand the numbers of ``row`` to TensorBoard as ``prefix/key``."""
        if self._writer is not None:
            for key, value in row.items():
                if key not in ("step", "samples") and _number(value):
                    self._writer.add_scalar(f"{prefix}/{key}", value, step)

    def close(self) -> None:
        """Flush to the disk and close."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def rewind(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop every row after ``step`` and what is not a whole line; returns the rows kept. Atomic."""
    kept = [row for row in read(path.parent) if row.get("step", 0) <= step]
    text = "".join(json.dumps(row, separators=(", ", ": ")) + "\n" for row in kept)
    if not path.exists() or path.read_text(encoding="utf-8", errors="replace") != text:
        aside = path.with_name(f".{path.name}")
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    return kept


def last(rows: Iterable[Row], key: str) -> Row | None:
    """The last row that has ``key``."""
    found = None
    for row in rows:
        if key in row:
            found = row
    return found


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _finite(row: Row) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
