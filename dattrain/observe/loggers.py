"""Where numbers and sample pictures go beside ``metrics.jsonl``: TensorBoard, CSV, Weights & Biases, MLflow. Rank 0 logs.

All get the same under the same names (``train/loss``, ``val/top1``, ``val/worst``), and the settings that differ from the defaults.
A logger that fails in the middle of a training is given up, with a line: all numbers are in ``metrics.jsonl``.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dattrain.errors import UserError
from dattrain.files import reason, replacing, write_atomically
from dattrain.observe.metrics import FILE, TENSORBOARD, Row

CSV = "csv"
"""Folder of a run: ``train.csv`` and ``val.csv``."""
IDS = "loggers.json"
"""File of a run: under which ids the services know it, so that a resumed run goes on there."""
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow"}
"""Loggers that need a package which is not installed with this one."""

log = logging.getLogger(__name__)


class Logger(Protocol):
    """One of them."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by name, ``train/loss``, of an update."""

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """A picture, H x W x 3 uint8."""

    def close(self) -> None:
        """Flush, and let go."""


def check(names: Sequence[str]) -> None:
    """Whether all of ``train.loggers`` can be used here. Raises UserError, naming the command that installs what is missing."""
    for name in names:
        package = PACKAGES.get(name)
        if package and importlib.util.find_spec(package) is None:
            raise UserError(
                f"train.loggers has {name}, and the package {package} is not installed: pip install {package}"
            )


class Loggers:
    """All loggers of a run.

    Args:
        names: ``train.loggers``.
        run_dir: the run folder.
        name: of the recipe: the project, or experiment, of services.
        step: the update that training resumes from.
        logged: the last update that an attempt before this one wrote down. What is trained anew gives the same numbers, and
            services take none back: they get those after it.
        settings: dotted key to value.
        metric: ``checkpoint.metric``, which runs are compared by.

    Raises:
        UserError: a package that is missing, or a service that does not answer.
    """

    def __init__(
        self,
        names: Sequence[str],
        run_dir: Path,
        *,
        name: str,
        step: int,
        logged: int,
        settings: Mapping[str, Any],
        metric: str,
    ) -> None:
        check(names)
        plain = {key: value if isinstance(value, (bool, int, float, str)) else json.dumps(value, default=str) for key, value in settings.items()}  # fmt: skip
        make: dict[str, Callable[[], Logger]] = {
            "tensorboard": lambda: TensorBoard(run_dir, step, plain, metric),
            "csv": lambda: Csv(run_dir, step),
            "wandb": lambda: Wandb(run_dir, name, logged, plain),
            "mlflow": lambda: MLflow(run_dir, name, logged, plain),
        }
        self._open: dict[str, Logger] = {}
        for each in names:
            try:
                self._open[each] = make[each]()
            except Exception as error:
                if each not in PACKAGES or isinstance(error, UserError):
                    raise
                # Whatever class of theirs it is: no login, no network, a server that refuses.
                offline = "; WANDB_MODE=offline keeps it on this disk" if each == "wandb" else ""
                raise UserError(f"train.loggers: {each} cannot start: {error}{offline}") from error

    def scalars(self, prefix: str, row: Row, step: int) -> None:
        """Hand the numbers of ``row`` on as ``prefix/key``."""
        values = {
            f"{prefix}/{key}": float(value)
            for key, value in row.items()
            if key not in ("step", "samples") and _number(value)
        }
        self._each(lambda logger: logger.scalars(values, step))

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Hand a picture on."""
        self._each(lambda logger: logger.image(name, pixels, step))

    def close(self) -> None:
        """Close all."""
        self._each(lambda logger: logger.close())
        self._open = {}

    def _each(self, action: Callable[[Logger], None]) -> None:
        for name, logger in list(self._open.items()):
            try:
                action(logger)
            except OSError as error:
                self._give_up(name, reason(error))
            except Exception as error:
                if name not in PACKAGES:
                    raise
                self._give_up(name, f"{type(error).__name__}: {error}")

    def _give_up(self, name: str, why: str) -> None:
        del self._open[name]
        shown = "TensorBoard's events" if name == "tensorboard" else name
        log.warning("%s cannot be written any more (%s); all numbers are in %s", shown, why, FILE)


class TensorBoard:
    """``RUN/tensorboard``: events; the settings are its hyperparameters, compared by ``metric``."""

    def __init__(self, run_dir: Path, step: int, settings: Mapping[str, Any], metric: str) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._writer = SummaryWriter(str(run_dir / TENSORBOARD), purge_step=step + 1)
        experiment, start, self._end = hparams(dict(settings), {f"val/{metric}": 0.0})
        for summary in (experiment, start):
            self._writer._get_file_writer().add_summary(summary)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """As scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """As images."""
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Close the file."""
        self._writer._get_file_writer().add_summary(self._end)
        self._writer.close()


class Csv:
    """``RUN/csv/train.csv`` and ``val.csv``, a row per step; rows after ``step`` are trained anew and taken out. No pictures."""

    def __init__(self, run_dir: Path, step: int) -> None:
        self._folder = run_dir / CSV
        self._folder.mkdir(exist_ok=True)
        self._columns: dict[str, list[str]] = {}
        for path in self._folder.glob("*.csv"):
            columns, rows = _read(path)
            self._write(path, columns, [row for row in rows if int(row["step"]) <= step])

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """A row in the file of each prefix; names that it does not have yet become columns at its right."""
        tables: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            prefix, _, key = name.rpartition("/")
            tables.setdefault(prefix, {"step": step})[key] = value
        for prefix, row in tables.items():
            path = self._folder / f"{prefix}.csv"
            columns = self._columns.get(path.name, [])
            if new := [key for key in row if key not in columns]:
                rows = _read(path)[1] if path.is_file() else []
                self._write(path, [*columns, *new], rows)
            with open(path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns[path.name], restval="").writerow(row)

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Not in a table."""

    def close(self) -> None:
        """Every row is written at once."""

    def _write(self, path: Path, columns: list[str], rows: Sequence[Mapping[str, Any]]) -> None:
        self._columns[path.name] = columns
        with replacing(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)


class Wandb:
    """Weights & Biases, as its own variables say: ``WANDB_MODE=offline`` writes to ``RUN/wandb``, ``WANDB_PROJECT`` names the project."""

    def __init__(self, run_dir: Path, name: str, logged: int, settings: Mapping[str, Any]) -> None:
        import wandb

        self._logged = logged
        self._image = wandb.Image
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "dattrain"), group=name, name=run_dir.name, dir=str(run_dir),
            id=_id(run_dir, "wandb", lambda: secrets.token_hex(4)), resume="allow", config=dict(settings),
            settings=wandb.Settings(console="off"),
        )  # fmt: skip
        # Its own counter of steps never goes back; ours is a number like the others.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """As a row of its history."""
        if step > self._logged:
            self._run.log({"step": step, **values})

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """As an image of its history."""
        if step > self._logged:
            self._run.log({"step": step, name: self._image(pixels)})

    def close(self) -> None:
        """End its process, once all is sent or written."""
        self._run.finish()


class MLflow:
    """MLflow at ``MLFLOW_TRACKING_URI``, or ``RUN/mlflow.db`` and ``RUN/mlflow``."""

    def __init__(self, run_dir: Path, name: str, logged: int, settings: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._logged, self._metric = logged, Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(uri or f"sqlite:///{run_dir / 'mlflow.db'}")

        def create() -> str:
            experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", name)
            found = self._client.get_experiment_by_name(experiment)
            place = None if uri else (run_dir / "mlflow").as_uri()
            number = found.experiment_id if found else self._client.create_experiment(experiment, place)
            return str(self._client.create_run(number, run_name=run_dir.name).info.run_id)

        self._id = _id(run_dir, "mlflow", create)
        self._client.update_run(self._id, status="RUNNING")
        known = self._client.get_run(self._id).data.params
        new = [Param(key, str(value)[:500]) for key, value in settings.items() if key not in known]
        for first in range(0, len(new), 100):  # as many as it takes at once
            self._client.log_batch(self._id, params=new[first : first + 100])

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """As metrics."""
        if step > self._logged:
            now = int(1000 * time.time())
            self._client.log_batch(
                self._id, [self._metric(name, value, now, step) for name, value in values.items()]
            )

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """As an artifact."""
        if step > self._logged:
            self._client.log_image(self._id, pixels, artifact_file=f"{name}-{step:08d}.png")

    def close(self) -> None:
        """Say that it is over."""
        self._client.set_terminated(self._id)


def _id(run_dir: Path, logger: str, create: Callable[[], str]) -> str:
    """The id that a service knows the run by: the one that is written down, or a new one."""
    path = run_dir / IDS
    try:
        ids = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(
            f"{path} is not readable ({error}); remove it to have {logger} begin a new run"
        ) from error
    if logger not in ids:
        ids[logger] = create()
        write_atomically(path, json.dumps(ids) + "\n")
    return str(ids[logger])


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows; one that a kill cut short is left out."""
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or ["step"])
        rows = [row for row in reader if None not in row.values() and (row.get("step") or "").isdigit()]
    return columns, rows


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
