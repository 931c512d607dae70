"""What happened to a training, with the time: ``RUN/events.jsonl``, one object per line. Rank 0 writes, starts append.

- ``start``: step that it goes on from, last (step), world, nodes (names), device, job (of Slurm, or null);
- ``evaluation``, ``save``: step;
- ``skipped``: step of an update that was not finite, in_a_row;
- ``rollback``: step, to (the step whose weights are taken again);
- ``resize``: step, img_size;
- ``end``: step, status (``finished``, ``preempted``, ``stopped``, ``failed``), and error of a failed one.

A process that was killed leaves no ``end``. What jobs did around a training is in ``submit/history.jsonl``.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from dattrain.files import reason
from dattrain.observe.metrics import parse

FILE = "events.jsonl"
PREDICTIONS = "predictions.json"
"""Beside it: what the newest evaluation found besides its metrics (``tasks.base.Evaluator.predictions``)."""

log = logging.getLogger(__name__)


def record(run_dir: Path, event: str, **fields: Any) -> None:
    """Append an event. A disk that takes none ends no training; it is said."""
    entry = {"time": round(time.time(), 3), "event": event, **fields}
    try:
        with open(run_dir / FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
    except OSError as error:
        log.warning("%s cannot be written (%s); training continues", run_dir / FILE, reason(error))


def read(run_dir: Path) -> list[dict[str, Any]]:
    """The events of a run, oldest first; a line that a kill cut off is left out."""
    path = run_dir / FILE
    rows = parse(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else []
    return [row for row in rows if isinstance(row.get("time"), (int, float)) and "event" in row]
