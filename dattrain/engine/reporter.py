"""What a training reports: rows of ``metrics.jsonl`` and loggers, events, the log line, the live line. Rank 0 writes.

The page that is made of them comes from outside (``train.OnEvaluation``), since it knows more than a training does.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dattrain.clock import duration
from dattrain.config.derive import Derived
from dattrain.config.load import changed
from dattrain.config.schema import Config
from dattrain.engine import early_stopping
from dattrain.engine.closing import closing_lines
from dattrain.engine.step import Update
from dattrain.engine.step_status import Slowest, StepStatus
from dattrain.errors import UserError
from dattrain.files import reason, write_atomically
from dattrain.observe import events
from dattrain.observe.loggers import Loggers
from dattrain.observe.metrics import Metrics, Row, scores
from dattrain.observe.sheet import sheet
from dattrain.observe.throughput import Meter, memory_gb, peak_flops
from dattrain.runtime import collectives
from dattrain.runtime.logging import Console
from dattrain.tasks.base import Task
from dattrain.urls import mask

log = logging.getLogger(__name__)


class Reporter:
    """Turns updates into rows and lines.

    Args:
        step: the update that training resumes at; later rows of an attempt that was killed are removed.
        class_names: by number, or none.
        on_evaluation: called on rank 0 with the run folder once an evaluation is written down.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        run_dir: Path,
        derived: Derived,
        device: torch.device,
        *,
        step: int,
        samples_per_epoch: int,
        console: Console | None,
        class_names: Sequence[str],
        on_evaluation: Callable[[Path], None] = lambda run_dir: None,
    ) -> None:
        self.config, self.task, self.derived, self.device = config, task, derived, device
        self.samples_per_epoch = samples_per_epoch
        self.bad_samples = 0
        self.meter = Meter()
        self._console, self._run_dir, self._on_evaluation = console, run_dir, on_evaluation
        self._metrics: Metrics | None = None
        self._loggers: Loggers | None = None
        self._class_names = class_names
        collectives.from_first(lambda: self._open(step))
        evaluations = [row for row in self.rows if "eval_images" in row]
        self._evaluated = {row["step"] for row in evaluations}
        self._scores = scores(evaluations, config.checkpoint.metric)
        self._mfu_scale = _mfu_scale(config, task, derived, device)

    @property
    def rows(self) -> Sequence[Row]:
        """What ``metrics.jsonl`` held at the start, up to the step that training resumes at; empty on other ranks than the first."""
        return self._metrics.rows if self._metrics else []

    def _open(self, step: int) -> None:
        c = self.config
        try:
            self._metrics = Metrics(self._run_dir, step)
            self._loggers = Loggers(
                c.train.loggers, self._run_dir, name=c.name, step=step, logged=self._metrics.logged,
                settings={key: mask(value) if isinstance(value, str) else value for key, value in changed(c).items()},
                metric=c.checkpoint.metric,
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"{self._run_dir}: cannot be written: {error.strerror or error}") from error

    def event(self, event: str, step: int, **fields: Any) -> None:
        """Write down what happens (``observe.events``)."""
        if self._metrics is not None:
            events.record(self._run_dir, event, step=step, **fields)

    def begin(self, step: int, last: int, hosts: Sequence[str]) -> None:
        """Say what is about to be trained, on which hosts (one per rank)."""
        c, d = self.config, self.derived
        self.event(
            "start", step, last=last, world=d.world, nodes=list(dict.fromkeys(hosts)), device=str(self.device),
            job=os.environ.get("SLURM_JOB_ID"),
        )  # fmt: skip
        if step > last:
            return
        log.info(
            "%s: %s, updates %d to %d of %d samples (%d x %d x %d), %.1f per epoch, ZeRO-%d, %s, on %s",
            c.name, c.model.name, step, last, c.train.global_batch, d.world, d.accumulation, d.micro_batch,
            d.steps_per_epoch, c.zero.stage, c.train.precision, self.device,
        )  # fmt: skip
        if 2 * d.warmup_steps > d.total_steps:
            log.warning(
                "the warm-up (%d updates) is more than half of the schedule (%s): the rate hardly falls again",
                d.warmup_steps, c.schedule.length,
            )  # fmt: skip
        self.meter = Meter()

    def evaluated(self, step: int) -> bool:
        """Whether the rows hold an evaluation of ``step``. Collective."""
        return bool(collectives.broadcast(step in self._evaluated))

    def update(
        self,
        update: Update,
        status: StepStatus,
        *,
        step: int,
        samples: int,
        lr: float,
        loss_scale: float | None,
        bad_samples: int,
        skipped_steps: int,
        slowest: Slowest | None,
        log_now: bool,
    ) -> None:
        """Write the row of one update, and at ``log_now`` its line."""
        self.bad_samples = bad_samples
        self.meter.update(self.config.train.global_batch, update.data_wait_s)
        if self._metrics is None:
            return
        rate = self.meter.images_per_s
        eta = (self.derived.last_step - step) * self.meter.seconds_per_update
        row: dict[str, Any] = {
            "step": step,
            "samples": samples,
            "epoch": round(samples / self.samples_per_epoch, 6),
            "loss": status.loss,
            **status.parts,
            "lr": lr,
            "grad_norm": update.grad_norm,
            "images_per_s": round(rate, 3),
            "data_wait": round(self.meter.data_wait, 4),
            "memory_gb": round(memory_gb(self.device), 3),
            "eta_s": round(eta, 1),
            "bad_samples": bad_samples,
            "skipped_steps": skipped_steps,
        }
        if loss_scale is not None:
            row["loss_scale"] = loss_scale
        if self._mfu_scale is not None:
            row["mfu"] = round(rate * self._mfu_scale, 4)
        self._metrics.write(row)
        if log_now:
            if self._loggers is not None:
                self._loggers.scalars("train", row, step)
            if self._console is not None:
                self._console.clear()  # or it would be drawn again below, an update or more behind
            log.info(self._line(row, slowest))
        elif self._console is not None:
            self._console.live(self._line(row, None))

    def evaluation(
        self,
        metrics: dict[str, float],
        predictions: Mapping[str, Any],
        step: int,
        samples: int,
        seconds: float,
        *,
        waited: int,
    ) -> None:
        """Write the row, the line and the predictions of one evaluation. In rows its loss is ``eval_loss``; ``loss`` is training's.

        Args:
            waited: evaluations since the last improvement; noted under early stopping.
        """
        self._evaluated.add(step)
        self.pause(seconds)
        if self._metrics is None:
            return
        row = {
            "step": step,
            "samples": samples,
            "epoch": round(samples / self.samples_per_epoch, 6),
            **{("eval_" + k if k in ("loss", "images") else k): v for k, v in metrics.items()},
            "seconds": round(seconds, 2),
        }
        patience, since = self.config.train.early_stopping_patience, ""
        if patience is not None:
            row[early_stopping.WAITED] = waited
            since = f"; {waited} of {patience} evaluations without improvement" if waited else ""
        self._metrics.write(row, durable=True)
        self._scores |= scores([row], self.config.checkpoint.metric)
        if self._console is not None:
            self._console.clear()
        if self._loggers is not None:
            named = {k.removeprefix("eval_"): v for k, v in row.items() if k != "epoch"}
            self._loggers.scalars("val", named, step)
            for kind in ("worst", "best"):
                if predictions.get(kind):
                    self._loggers.image(f"val/{kind}", sheet(predictions[kind], self._class_names), step)
        log.info(
            "step %d: %s on %d images in %s%s",
            step, self.task.summary(metrics), metrics["images"], duration(seconds), since,
        )  # fmt: skip
        self.event("evaluation", step)
        if predictions:
            about = {
                "step": step,
                "data": mask(self.config.data.val or ""),
                "averaged": any(name.startswith("ema_") for name in metrics),
            }
            try:
                write_atomically(self._run_dir / events.PREDICTIONS, json.dumps({**about, **predictions}))
            except OSError as error:
                log.warning("%s cannot be written (%s)", self._run_dir / events.PREDICTIONS, reason(error))
        self._on_evaluation(self._run_dir)

    def pause(self, seconds: float) -> None:
        """Leave ``seconds`` out of the rates."""
        self.meter.pause(seconds)

    def evaluating(self, step: int, what: str, done: int, total: int) -> None:
        """Show how far an evaluation is, on a terminal."""
        if self._console is not None:
            self._console.live(f"step {step}: evaluating{what}, batch {done} of {total}")

    def end(self, status: str, why: str, step: int, seconds: float) -> None:
        """Say how it ended, and what can be done next."""
        self.event("end", step, status=status)
        if self._metrics is None:
            return
        if self._console is not None:
            self._console.clear()
        log.info(
            "%s at step %d of %d in %s (%s)",
            status,
            step,
            max(step, self.derived.last_step),
            duration(seconds),
            why,
        )
        for line, style in closing_lines(self._run_dir, self.config, status, self._scores):
            log.info("%s", line, extra={"style": style})

    def close(self) -> None:
        """Close the files."""
        if self._metrics is not None:
            self._metrics.close()
        if self._loggers is not None:
            self._loggers.close()

    def _line(self, row: dict[str, Any], slowest: Slowest | None) -> str:
        parts = [
            f"step {row['step']}/{self.derived.last_step}",
            f"epoch {row['epoch']:.2f}",
            f"loss {row['loss']:.4f}",
            f"lr {row['lr']:.2e}",
            f"norm {row['grad_norm']:.2f}",
            f"{row['images_per_s']:.1f} img/s",
            f"wait {row['data_wait']:.0%}",
            f"{row['memory_gb']:.1f} GB",
            f"eta {duration(row['eta_s'])}",
        ]
        if "mfu" in row:
            parts.append(f"mfu {row['mfu']:.1%}")
        if "loss_scale" in row:
            parts.append(f"scale {row['loss_scale']:g}")
        if row["bad_samples"]:
            parts.append(f"bad samples {row['bad_samples']}")
        if row["skipped_steps"]:
            parts.append(f"skipped {row['skipped_steps']}")
        if slowest is not None:
            parts.append(f"slowest rank {slowest.rank} on {slowest.host} +{slowest.excess:.0%}")
        return "  ".join(parts)


def _mfu_scale(config: Config, task: Task, derived: Derived, device: torch.device) -> float | None:
    """MFU per image/s, None where the device's peak is not known."""
    if device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(device), config.train.precision)
    if peak is None:
        return None
    # A multiply-add is two operations; backward costs twice the forward. The count is at the model's own size.
    work = 3 * 2 * task.flops(config.model.img_size)
    return work / (peak * derived.world) if math.isfinite(work) else None
