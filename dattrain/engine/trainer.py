"""The loop: from a recipe and a run folder to weights. Everything that it does is a call to a module beside it.

``samples_seen`` is the position: it decides order, augmentation, rate and size, so a resume is arithmetic. What is not here:
one update (``step``), DeepSpeed (``zero``), the model at its size (``session``), what ranks exchange (``step_status``),
what is learned (``dattrain.tasks``), checkpoints (``dattrain.state``), signals and the process group (``train``).
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from dattrain.config.derive import check_source, derive
from dattrain.config.schema import Config
from dattrain.config.values import as_pair
from dattrain.engine import micro_batch, precision, resume_rules, run_folder, schedule, starts, zero
from dattrain.engine.debug_dump import write_debug_dump
from dattrain.engine.early_stopping import EarlyStopping
from dattrain.engine.evaluate import Evaluations, Interrupted, check_metric
from dattrain.engine.log_interval import LogInterval
from dattrain.engine.new_resolution import resume_at_new_resolution, size_at
from dattrain.engine.rank_zero import newest_checkpoint
from dattrain.engine.reporter import Reporter
from dattrain.engine.session import Session, open_session
from dattrain.engine.step import Update, seed_all
from dattrain.engine.step_status import StepStatus, Stragglers, reduce_status, stopped_by
from dattrain.errors import REQUEUE, UserError
from dattrain.models.flops import count_call
from dattrain.observe import loggers
from dattrain.observe.profile import Profiler
from dattrain.runtime import environment
from dattrain.runtime.collectives import broadcast, from_first
from dattrain.runtime.environment import Env
from dattrain.runtime.health import Action, Decision, NonFinitePolicy, Watchdog
from dattrain.runtime.logging import Console
from dattrain.runtime.owner import Owner
from dattrain.runtime.signals import Preemption, StopRequest
from dattrain.state.checkpointer import Checkpointer
from dattrain.state.format.manifest import Manifest
from dattrain.tasks.base import Task, TrainLoader
from dattrain.tasks.create import create_task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a training ended; the state is saved in every case."""

    status: Literal["finished", "preempted", "stopped"]
    step: int
    samples_seen: int
    why: str = ""
    """The limit, signal or file that ended it."""

    @property
    def exit_code(self) -> int:
        """0; ``errors.REQUEUE`` for a preempted one, which wants to be started again."""
        return REQUEUE if self.status == "preempted" else 0


class Trainer:
    """The state of a training: position, session, data, counters. ``run`` is the loop."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        env: Env,
        device: torch.device,
        preemption: Preemption,
        watchdog: Watchdog,
        console: Console | None,
        stack: ExitStack,
        owner: Owner | None,
        on_evaluation: Callable[[Path], None],
    ) -> None:
        self.config, self.run_dir, self.env, self.device = config, run_dir, env, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.preemption, self.watchdog = preemption, watchdog
        self.task: Task = create_task(config)
        check_metric(config, self.task)
        loggers.check(config.train.loggers)
        self.step = self.samples_seen = 0
        health = config.train.health
        self.policy = NonFinitePolicy(health.max_bad_steps, health.max_rollbacks)
        self._bad_before = 0  # skipped samples of the attempts before this one
        self._saved = -1
        self._seconds_before, self._begun = 0.0, time.monotonic()
        self.checkpointer = Checkpointer.from_config(run_dir, config, owner)
        # Across sizes all of a checkpoint is read beforehand, since the one before it may need another model.
        self._read_all = bool(config.train.progressive)
        found = newest_checkpoint(self.checkpointer.root, read_all=self._read_all)
        per_epoch = None
        if found is None:
            check_source(config)
        else:
            newest = found[0].name, found[1].meta
            from_first(lambda: resume_rules.check_settings(run_dir, config, *newest))
            # One that DeepSpeed wrote knows nothing of the data.
            per_epoch = found[1].meta.get("samples_per_epoch")
            self._restore_counters(found[1].meta)
        asked, config = config, micro_batch.settle(config, self.world, device, env.local_world)
        self.config, self.task = config, create_task(config)
        if config.train.fast_dev_run:
            log.info(
                "train.fast_dev_run: two updates, one evaluation and one save, to see that all of it works"
            )
        self.img_size = size_at(config, self.samples_seen, per_epoch or 1 << 62)
        # The loader says how long an epoch is, and what is wrong with the data, before anything large is built.
        self.loader = self._open_loader()
        stack.callback(self.close)
        self.samples_per_epoch = self.loader.samples_per_epoch
        data, classes = self.loader.identity, self.loader.classes
        if found is not None:
            from_first(
                lambda: resume_rules.check_data(run_dir, config, *newest, data, self.samples_per_epoch)
            )
            from_first(lambda: resume_rules.check_classes(run_dir, *newest, classes))
        self._fixed = resume_rules.record(config, data, classes)
        self.derived = derive(config, world=self.world, samples_per_epoch=self.samples_per_epoch)
        self.evaluations = Evaluations(
            self.task, config, classes, rank=self.rank, world=self.world, device=device
        )
        stack.callback(self.evaluations.close)
        if config.data.val is not None:
            self.evaluations.loader(self.img_size)  # what is wrong with it is said now, not after an epoch
        device_name = environment.device_name(device)
        position = {"step": self.step, "last_step": max(self.step, self.derived.last_step)}
        from_first(lambda: run_folder.open_run(run_dir, asked, classes, env, device_name, position))
        self.session = self._open_session(found)
        stack.callback(lambda: self.session.close())
        self.reporter = Reporter(
            config, self.task, run_dir, self.derived, device, step=self.step,
            samples_per_epoch=self.samples_per_epoch, console=console, class_names=classes.names,
            on_evaluation=on_evaluation,
        )  # fmt: skip
        stack.callback(self.reporter.close)
        self.stopping = EarlyStopping(config, self.reporter.rows)
        self.log_interval = LogInterval(config.train.log_every, first=self.rank == 0)
        self.stragglers = Stragglers(env.host, device)
        self.profiler = Profiler(
            config.train.profile.steps, run_dir / "profile", self.rank, device,
            dtype=precision.COMPUTE[config.train.precision], count=count_call,
        )  # fmt: skip
        stack.callback(self.profiler.finish)

    # The loop -----------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Train to the end, or until all ranks agree to stop."""
        last = self.derived.last_step
        self.reporter.begin(self.step, last, self.stragglers.hosts)
        self.checkpointer.prepare(self.session.engine, self.session.ema_tensors)
        if self.step and self._due(self.derived.eval_steps) and not self.reporter.evaluated(self.step):
            # Killed between a save and its evaluation.
            self.evaluate()
        gc.collect()
        gc.disable()
        done = self.stopped_early()  # by the evaluations of the attempts before
        while self.step < last and not done:
            update = self.update()
            status = self.step_boundary(update)
            if status.request:
                return self.save_and_exit(status.request)
            if self._due(self.derived.checkpoint_steps) and not self.policy.in_a_row:
                # In a row of bad steps the weights may be what is wrong: a rollback must find those before it.
                self.save()
            # After the save of this step, which an evaluation that fails then cannot lose.
            if self._due(self.derived.eval_steps):
                request = self.evaluate()
                if request:
                    return self.save_and_exit(request)
                done = self.stopped_early()
            if done:
                break
            self.change_size()
            if self.step % self.config.train.gc_every == 0:
                gc.collect()
        if done:
            self.save(background=False)
        self.checkpointer.wait()
        return self._end("finished", self.stopping.reason() if done else self._limit())

    def update(self) -> Update:
        """One update at the current position, which then moves on whatever became of it."""
        self.watchdog.beat("reading and updating")
        seed_all(self.config.train.seed, self.samples_seen, self.rank)
        lr = schedule.rate(self.config.schedule, self.derived, self.step)
        with self.profiler.step(self.step, self.session.engine.module):
            update = self.session.train_step(self.loader, lr)
        if update.applied and self.session.ema is not None:
            self.session.ema.update()
        self.step += 1
        self.samples_seen += self.config.train.global_batch
        self.lr = lr
        return update

    def step_boundary(self, update: Update) -> StepStatus:
        """Agree with the other ranks on the step's status, write the numbers down, and act on what is not finite."""
        self.watchdog.beat("waiting for the other ranks")
        status = reduce_status(
            update,
            request=self.preemption.request(look_for_file=self.rank == 0),
            save_failed=self.checkpointer.failed,
            bad_samples=self.loader.skipped.count,
            device=self.device,
            log_due=self.log_interval.due(self.step),
        )
        self.reporter.pause(self.watchdog.pauses())
        if status.save_failed:
            self.checkpointer.wait()
        self.stragglers.add(update)
        logs_now = status.log_due or self.step == self.derived.last_step
        if logs_now:
            self.log_interval.logged()
        scale = zero.loss_scale(self.session.engine)
        # A dynamic loss scale overflows now and then by design; that is only an event when it cannot be lowered further.
        finite = status.finite and (update.applied or (scale is not None and scale > 1))
        decision = self.policy.decide(finite)
        self.reporter.update(
            update, status, step=self.step, samples=self.samples_seen, lr=self.lr, loss_scale=scale,
            bad_samples=self._bad_before + status.bad_samples, skipped_steps=self.policy.total,
            slowest=self.stragglers.slowest() if logs_now else None, log_now=logs_now,
        )  # fmt: skip
        if decision.action is not Action.NONE:
            self.handle_non_finite(decision, update)
        return status

    def handle_non_finite(self, decision: Decision, update: Update) -> None:
        """Skip a non-finite update, or restore the last checkpoint's weights and train on past the batch, or stop.

        Raises:
            UserError: rolling back has not helped; names the debug dump.
        """
        log.warning("step %d was not finite and was skipped (%d in a row)", self.step, decision.in_a_row)
        self.reporter.event("skipped", self.step, in_a_row=decision.in_a_row)
        if decision.action is Action.SKIP:
            return
        folder = write_debug_dump(self.run_dir, self.step, self.session.engine, update, self.rank)
        if decision.action is Action.STOP:
            raise UserError(
                f"step {self.step} is not finite, after {self.policy.rollbacks} rollbacks "
                f"(train.health.max_rollbacks); what is known of it is in {folder}. The checkpoints are intact"
            )
        self.checkpointer.wait()
        found = newest_checkpoint(self.checkpointer.root, read_all=self._read_all)
        if found is None:
            return log.warning("no checkpoint to roll back to; training on with the weights as they are")
        log.warning(
            "rolling back to the weights of step %d, training on past step %d", found[1].step, self.step
        )
        self.reporter.event("rollback", self.step, to=found[1].step)
        if as_pair(found[1].meta["img_size"]) == as_pair(self.img_size):
            self.checkpointer.resume(self.session.engine, self.session.ema_tensors)
        else:
            self._resume_at_new_resolution(self.session, found[0])
        # Without this a restart would come to the same batches again.
        self.save(background=False)

    def save_and_exit(self, request: StopRequest) -> Outcome:
        """Save, and say how it ended."""
        self.save(background=False)
        why = stopped_by(self.preemption, self.env.host)
        if self.rank == 0:
            self.preemption.clear_stop_file()
        return self._end("stopped" if request == StopRequest.STOP else "preempted", why)

    # Between updates ----------------------------------------------------------------------------------------------

    def evaluate(self) -> StopRequest:
        """Evaluate weights and averages; returns a request that cut it short."""
        if self.config.data.val is None or self.evaluations.step == self.step:
            return StopRequest.NONE
        begin = time.perf_counter()
        self.watchdog.beat("evaluating")
        try:
            metrics = self.evaluations.run(
                self.session,
                self.step,
                should_stop=lambda: bool(self.preemption.request(look_for_file=self.rank == 0)),
                beat=self._beat_evaluating,
                settle=self.checkpointer.wait_for_staging,
            )
        except Interrupted:
            log.info("evaluation stopped: asked to end")
            return StopRequest.STOP if self.preemption.request() == StopRequest.STOP else StopRequest.PREEMPT
        except Exception:
            self.checkpointer.let_finish()
            raise
        seconds = time.perf_counter() - begin
        self.stopping.add(self.step, metrics.get(self.config.checkpoint.metric))
        self.reporter.evaluation(
            metrics,
            self.evaluations.predictions,
            self.step,
            self.samples_seen,
            seconds,
            waited=self.stopping.waited,
        )
        if self.rank == 0:
            self.checkpointer.record(self.step, metrics)
        self.watchdog.beat("evaluated")
        self.watchdog.pauses()  # left out already
        return StopRequest.NONE

    def stopped_early(self) -> bool:
        """Whether the evaluations so far say that the run is done (``train.early_stopping_patience``). Collective: rank 0 decides."""
        return self.stopping.patience is not None and bool(broadcast(self.stopping.reached))

    def _beat_evaluating(self, what: str, done: int, total: int) -> None:
        self.watchdog.beat("evaluating")
        self.reporter.evaluating(self.step, what, done, total)

    def save(self, *, background: bool | None = None) -> None:
        """Save this position, unless that is done."""
        if self._saved == self.step:
            self.checkpointer.wait()
            return
        self.watchdog.beat("saving")
        meta = {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "samples_per_epoch": self.samples_per_epoch,
            "epoch": self.samples_seen / self.samples_per_epoch,
            "img_size": self.img_size,
            "metrics": self.evaluations.metrics if self.evaluations.step == self.step else {},
            # A label set tells them; names of one's own travel with the weights.
            "class_names": [] if self.config.data.labels else list(self.loader.classes.names),
            "seconds": round(self.seconds, 1),
            "health": self.policy.state(),
            "bad_samples": self.reporter.bad_samples,
            resume_rules.META: self._fixed,
        }
        self.session.train_step.statistics.average()
        lost = self.checkpointer.save(
            self.session.engine, self.session.ema_tensors, meta, background=background
        )
        self._saved = self.step
        self.reporter.event("save", self.step)
        self.reporter.pause(lost)
        self.watchdog.pauses()  # left out already

    def change_size(self) -> None:
        """Where a phase of ``train.progressive`` begins: save, and resume in a session of the new size."""
        size = size_at(self.config, self.samples_seen, self.samples_per_epoch)
        if size == self.img_size or self.step >= self.derived.last_step:
            return
        log.info("from step %d on: %s px instead of %s", self.step, size, self.img_size)
        self.reporter.event("resize", self.step, img_size=size)
        self.save(background=False)
        found = newest_checkpoint(self.checkpointer.root, read_all=self._read_all)
        assert found is not None
        self.session.close()
        self.loader.close()
        self.img_size = size
        self.loader = self._open_loader()
        self.session = self._open_session(found)
        self.checkpointer.prepare(self.session.engine, self.session.ema_tensors)

    # Beginning and end --------------------------------------------------------------------------------------------

    def _restore_counters(self, meta: Any) -> None:
        self.step, self.samples_seen = meta["step"], meta["samples_seen"]
        self.policy.restore(meta["health"])
        self._bad_before = meta["bad_samples"]
        self._seconds_before = meta.get("seconds", 0.0)
        self._saved = self.step

    def _open_loader(self) -> TrainLoader[Any]:
        return self.task.train_loader(
            rank=self.rank, world=self.world, samples_seen=self.samples_seen, device=self.device,
            img_size=self.img_size,
        )  # fmt: skip

    def _open_session(self, found: tuple[Path, Manifest] | None) -> Session:
        """A session at the current size and position: fresh, or with the state of a checkpoint."""
        session = open_session(
            self.config,
            self.derived,
            self.device,
            self.img_size,
            task=self.task,
            manifest=None if found is None else found[1],
            classes=self.loader.classes,
        )
        if found is None:
            return session
        folder, manifest = found
        if as_pair(manifest.meta["img_size"]) != as_pair(self.img_size):
            self._resume_at_new_resolution(session, folder)
            log.info(
                "resumed %s at %s px instead of %s", folder.name, self.img_size, manifest.meta["img_size"]
            )
            return session
        meta = self.checkpointer.resume(session.engine, session.ema_tensors)
        assert meta is not None
        if meta["step"] != self.step:
            # The newest one was damaged where only its checksums tell.
            self._restore_counters(meta)
            self.loader.close()
            self.loader = self._open_loader()
        log.info("resumed from %s at step %d", self.checkpointer.resumed_from, self.step)
        return session

    def _resume_at_new_resolution(self, session: Session, folder: Path) -> None:
        resume_at_new_resolution(session.engine, session.ema_tensors, self.task, session.img_size, folder)

    @property
    def seconds(self) -> float:
        """Of all starts of the run together, without what was lost behind their last checkpoints."""
        return self._seconds_before + time.monotonic() - self._begun

    def _end(self, status: Literal["finished", "preempted", "stopped"], why: str) -> Outcome:
        if self.rank == 0:
            starts.end(self.run_dir, status, why, self.step)
        self.reporter.end(status, why, self.step, self.seconds)
        return Outcome(status, self.step, self.samples_seen, why)

    def _limit(self) -> str:
        """The setting that ends the training where nothing else does."""
        train, schedule, last = self.config.train, self.config.schedule, self.derived.last_step
        if last < self.derived.total_steps:
            setting = "train.fast_dev_run=true" if train.fast_dev_run else f"train.max_steps={last}"
        elif schedule.updates is not None:
            setting = f"schedule.updates={schedule.updates}"
        else:
            setting = f"schedule.epochs={schedule.epochs:g}"
        return setting if self.step <= last else f"nothing was left to do: {setting} ends at step {last}"

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.derived.last_step

    def close(self) -> None:
        """End the data workers. Not collective: also after a failure."""
        gc.enable()
        self.loader.close()
