"""The loop: from a recipe and a run folder to weights. Everything that it does is a call to a module beside it.

``samples_seen`` is the position: it decides order, augmentation, rate and size, so a resume is arithmetic. What is not here:
one update (``step``), DeepSpeed (``zero``), the model at its size (``session``), what ranks tell each other (``agree``),
checkpoints (``dattrain.state``), signals (``dattrain.runtime.signals``).
"""

from __future__ import annotations

import gc
import logging
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from dattrain.config.derive import Derived, check_source, derive
from dattrain.config.schema import Config
from dattrain.data.factory import eval_loader, train_loader
from dattrain.data.loader import EvalLoader, TrainLoader
from dattrain.engine import evaluate as evaluation
from dattrain.engine import resume_rules, run_folder, schedule, zero
from dattrain.engine.debug_dump import write_bundle
from dattrain.engine.rank_zero import Claim, newest_checkpoint, on_first_rank, random_word
from dattrain.engine.reporter import Reporter
from dattrain.engine.session import Session, Size, as_pair, carry, open_session, size_at
from dattrain.engine.step import COMPUTE, Update, seed_all
from dattrain.engine.step_status import Edge, Stragglers, agree
from dattrain.errors import REQUEUE, UserError
from dattrain.models.flops import count_call
from dattrain.observe.profile import Profiler
from dattrain.runtime import environment, preflight
from dattrain.runtime import logging as logs
from dattrain.runtime.environment import Env
from dattrain.runtime.health import Verdict, Verdicts, Watchdog
from dattrain.runtime.owner import Owner
from dattrain.runtime.signals import Preemption, StopRequest
from dattrain.state.checkpointer import Checkpointer
from dattrain.state.format.manifest import Manifest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a training ended; the state is saved in every case."""

    status: Literal["finished", "preempted", "stopped"]
    step: int
    samples_seen: int

    @property
    def exit_code(self) -> int:
        """0; ``errors.REQUEUE`` for a preempted one, which wants to be started again."""
        return REQUEUE if self.status == "preempted" else 0


def train(config: Config, run_dir: Path, *, env: Env | None = None) -> Outcome:
    """Train ``config`` in ``run_dir``, going on where its newest complete checkpoint is. Every rank of the job calls it.

    Joins the process group (and leaves it) unless the caller has done so. Signals that preempt are caught meanwhile and
    the handlers before restored; the caller requeues (``Outcome.status``). The run folder is this job's alone until it returns.

    Raises:
        Held: (a UserError, on every rank) another job trains in ``run_dir``, or has taken it over.
        UserError: what the user can put right: data, settings, disk, a run that no longer yields finite steps.
    """
    run_dir = run_dir.absolute()
    env = env or environment.resolve(os.environ)
    settings = config.train
    environment.configure(
        threads=settings.threads, deterministic=settings.deterministic, tf32=settings.tf32, env=env
    )
    device = environment.pick_device(env)
    with ExitStack() as stack:
        preemption = Preemption(run_dir).install()
        stack.callback(preemption.restore)
        claim = Claim(run_dir, env, preemption)
        stack.callback(claim.release)
        log_file = logs.setup(run_dir, env.rank, env.world, env.host)
        stack.callback(log_file.close)
        health = config.train.health
        watchdog = Watchdog(health.stall_seconds, run_dir, log_file.file, env.rank, env.host).start()
        stack.callback(watchdog.close)
        try:
            alone = not dist.is_initialized()
            if alone:
                preflight.reach(env)
                # Longer than the watchdog's patience: it names who is silent, a collective's timeout does not.
                patience = max(1800.0, 2 * health.stall_seconds)
                stack.enter_context(
                    environment.process_group(env, device, patience, disconnect=zero.destroy_process_group)
                )
            on_first_rank(claim.check)
            if alone:
                for line in preflight.check(env, run_dir).lines():
                    log.info("%s", line, extra={"console": False})
            watchdog.attempt = random_word()
            trainer = Trainer(
                config, run_dir, env, device, preemption, watchdog, log_file.console, stack, claim.owner
            )  # fmt: skip
            outcome = trainer.run()
            dist.barrier()
        except UserError as error:
            log.error("%s", error, extra={"console": False})
            raise
        except BaseException:
            log.exception("rank %d on %s failed", env.rank, env.host, extra={"console": False})
            raise
    return outcome


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
        console: logs.Console | None,
        stack: ExitStack,
        owner: Owner | None = None,
    ) -> None:
        self.config, self.run_dir, self.env, self.device = config, run_dir, env, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.preemption, self.watchdog = preemption, watchdog
        self.step = self.samples_seen = 0
        self.verdicts = Verdicts(config.train.health.max_bad_steps, config.train.health.max_rollbacks)
        self._bad_before = 0  # skipped samples of the attempts before this one
        self._evaluated = self._saved = -1
        self._metrics: dict[str, float] = {}
        self._eval: tuple[Size, EvalLoader] | None = None
        self.checkpointer = Checkpointer.from_config(run_dir, config, owner)
        # Across sizes all of a checkpoint is read beforehand, since the one before it may need another model.
        self._read_all = bool(config.train.progressive)
        found = newest_checkpoint(self.checkpointer.root, read_all=self._read_all)
        per_epoch = None
        if found is None:
            check_source(config)
        else:
            newest = found[0].name, found[1].meta
            on_first_rank(lambda: resume_rules.check_settings(run_dir, config, *newest))
            # One that DeepSpeed wrote knows nothing of the data.
            per_epoch = found[1].meta.get("samples_per_epoch")
            self._restore_counters(found[1].meta)
        self.img_size = size_at(config, self.samples_seen, per_epoch or 1 << 62)
        # The loader says how long an epoch is, and what is wrong with the data, before anything large is built.
        self.loader = self._open_loader()
        stack.callback(self.close)
        self.samples_per_epoch = self.loader.samples_per_epoch
        data, classes = self.loader.identity, self.loader.classes
        if found is not None:
            on_first_rank(
                lambda: resume_rules.check_data(run_dir, config, *newest, data, self.samples_per_epoch)
            )
            on_first_rank(lambda: resume_rules.check_classes(run_dir, *newest, classes))
        self._fixed = resume_rules.record(config, data, classes)
        self.derived: Derived = derive(config, world=self.world, samples_per_epoch=self.samples_per_epoch)
        if config.data.val is not None:
            self._eval_loader()  # what is wrong with it is said now, not after the first epoch
        on_first_rank(
            lambda: run_folder.open_run(
                run_dir, config, self.loader.classes, env, environment.device_name(device)
            )
        )
        self.session = self._open_session(found)
        stack.callback(lambda: self.session.close())
        self.reporter = Reporter(
            config, run_dir, self.derived, device, step=self.step, samples_per_epoch=self.samples_per_epoch,
            console=console, first=self.rank == 0,
        )  # fmt: skip
        stack.callback(self.reporter.close)
        self.stragglers = Stragglers(env.host, device)
        self.profiler = Profiler(
            config.train.profile.steps, run_dir / "profile", self.rank, device,
            dtype=COMPUTE[config.train.precision], count=count_call,
        )  # fmt: skip
        stack.callback(self.profiler.finish)

    # The loop -----------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Train to the end, or until all ranks agree to stop."""
        last = self.derived.last_step
        self.reporter.begin(self.step, last)
        self.checkpointer.prepare(self.session.engine, self.session.ema_tensors)
        if self.step and self._due(self.derived.eval_steps) and not self.reporter.evaluated(self.step):
            # Killed between a save and its evaluation.
            self.evaluate()
        gc.collect()
        gc.disable()
        while self.step < last:
            update = self.update()
            edge = self.meet(update)
            if edge.request:
                return self.leave(edge.request)
            if self._due(self.derived.eval_steps):
                request = self.evaluate()
                if request:
                    return self.leave(request)
            if self._due(self.derived.checkpoint_steps) and not self.verdicts.in_a_row:
                # In a row of bad steps the weights may be what is wrong: a rollback must find those before it.
                self.save()
            self.change_size()
            if self.step % self.config.train.gc_every == 0:
                gc.collect()
        self.checkpointer.wait()
        return self._end("finished")

    def update(self) -> Update:
        """One update at the current position, which then moves on whatever became of it."""
        self.watchdog.beat("reading and updating")
        seed_all(self.config.train.seed, self.samples_seen, self.rank)
        lr = schedule.rate(self.config.schedule.kind, self.derived, self.step)
        with self.profiler.step(self.step, self.session.engine.module):
            update = self.session.updater(self.loader, lr)
        if update.applied and self.session.ema is not None:
            self.session.ema.update()
        self.step += 1
        self.samples_seen += self.config.train.global_batch
        self.lr = lr
        return update

    def meet(self, update: Update) -> Edge:
        """Agree with the other ranks at the step's edge, write the numbers down, and act on what is not finite."""
        self.watchdog.beat("waiting for the other ranks")
        edge = agree(
            update,
            request=self.preemption.request(look_for_file=self.rank == 0),
            save_failed=self.checkpointer.failed,
            bad_samples=self.loader.skipped.count,
            device=self.device,
        )
        self.reporter.pause(self.watchdog.pauses())
        if edge.save_failed:
            self.checkpointer.wait()
        self.stragglers.add(update)
        logs_now = self.step % self.config.train.log_every == 0 or self.step == self.derived.last_step
        scale = zero.loss_scale(self.session.engine)
        # A dynamic loss scale overflows now and then by design; that is only an event when it cannot be lowered further.
        finite = edge.finite and (update.applied or (scale is not None and scale > 1))
        verdict = self.verdicts.judge(finite)
        self.reporter.update(
            update, edge, step=self.step, samples=self.samples_seen, lr=self.lr, loss_scale=scale,
            bad_samples=self._bad_before + edge.bad_samples, skipped_steps=self.verdicts.total,
            slowest=self.stragglers.slowest() if logs_now else None, log_now=logs_now,
        )  # fmt: skip
        if verdict is not Verdict.GOOD:
            self.heal(verdict, update)
        return edge

    def heal(self, verdict: Verdict, update: Update) -> None:
        """After a non-finite update: go on, restore the last checkpoint's weights and go on past the batch, or stop.

        Raises:
            UserError: rolling back has not helped; names the bundle.
        """
        log.warning("step %d was not finite and was skipped (%d in a row)", self.step, self.verdicts.in_a_row)
        if verdict is Verdict.SKIP:
            return
        folder = write_bundle(self.run_dir, self.step, self.session.engine, update, self.rank)
        if verdict is Verdict.STOP:
            raise UserError(
                f"step {self.step} is not finite, after {self.verdicts.rollbacks} rollbacks "
                f"(train.health.max_rollbacks); what is known of it is in {folder}. The checkpoints are intact"
            )
        self.checkpointer.wait()
        found = newest_checkpoint(self.checkpointer.root, read_all=self._read_all)
        if found is None:
            return log.warning("no checkpoint to roll back to; going on with the weights as they are")
        log.warning("rolling back to the weights of step %d, going on past step %d", found[1].step, self.step)
        if as_pair(found[1].meta["img_size"]) == as_pair(self.img_size):
            self.checkpointer.resume(self.session.engine, self.session.ema_tensors)
        else:
            carry(self.session, self.config, found[0])
        # Without this a restart would meet the same batches again.
        self.save(background=False)

    def leave(self, request: StopRequest) -> Outcome:
        """Save, and say how it ended."""
        self.save(background=False)
        if self.rank == 0:
            self.preemption.clear_stop_file()
        return self._end("stopped" if request == StopRequest.STOP else "preempted")

    # Between updates ----------------------------------------------------------------------------------------------

    def evaluate(self) -> StopRequest:
        """Evaluate weights and averages; returns a request that cut it short."""
        if self.config.data.val is None or self._evaluated == self.step:
            return StopRequest.NONE
        begin = time.perf_counter()
        self.watchdog.beat("evaluating")
        try:
            metrics = self._evaluate_once("")
            if self.session.ema is not None and self.config.eval.ema:
                self.checkpointer.wait_for_staging()  # a skipped update has not waited for the save before it
                with self.session.ema.applied():
                    metrics |= self._evaluate_once("ema_")
        except evaluation.Interrupted:
            log.info("evaluation left: asked to end")
            return StopRequest.STOP if self.preemption.request() == StopRequest.STOP else StopRequest.PREEMPT
        self._evaluated, self._metrics = self.step, metrics
        self.reporter.evaluation(metrics, self.step, self.samples_seen, time.perf_counter() - begin)
        self.watchdog.beat("evaluated")
        self.watchdog.pauses()  # left out already
        return StopRequest.NONE

    def _evaluate_once(self, prefix: str) -> dict[str, float]:
        found = evaluation.evaluate(
            self.session.engine, self._eval_loader(), self.config, self.device,
            leave=lambda: bool(self.preemption.request(look_for_file=self.rank == 0)),
            beat=lambda: self.watchdog.beat("evaluating"),
        )  # fmt: skip
        return {prefix + key: value for key, value in found.items()}

    def _eval_loader(self) -> EvalLoader:
        if self._eval is None or self._eval[0] != self.img_size:
            if self._eval is not None:
                self._eval[1].close()
            loader = eval_loader(
                self.config, self.loader.classes, rank=self.rank, world=self.world, device=self.device,
                img_size=self.img_size,
            )  # fmt: skip
            self._eval = (self.img_size, loader)
        return self._eval[1]

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
            "metrics": self._metrics if self._evaluated == self.step else {},
            "health": self.verdicts.state(),
            "bad_samples": self.reporter.bad_samples,
            resume_rules.META: self._fixed,
        }
        lost = self.checkpointer.save(
            self.session.engine, self.session.ema_tensors, meta, background=background
        )
        self._saved = self.step
        self.reporter.pause(lost)
        self.watchdog.pauses()  # left out already

    def change_size(self) -> None:
        """Where a phase of ``train.progressive`` begins: save, and go on in a session of the new size."""
        size = size_at(self.config, self.samples_seen, self.samples_per_epoch)
        if size == self.img_size or self.step >= self.derived.last_step:
            return
        log.info("from step %d on: %s px instead of %s", self.step, size, self.img_size)
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
        self.verdicts.restore(meta["health"])
        self._bad_before = meta["bad_samples"]
        self._saved = self.step

    def _open_loader(self) -> TrainLoader:
        return train_loader(
            self.config, rank=self.rank, world=self.world, samples_seen=self.samples_seen, device=self.device,
            img_size=self.img_size,
        )  # fmt: skip

    def _open_session(self, found: tuple[Path, Manifest] | None) -> Session:
        """A session at the current size and position: fresh, or with the state of a checkpoint."""
        manifest = None if found is None else found[1]
        session = open_session(
            self.config,
            self.derived,
            self.device,
            self.img_size,
            manifest=manifest,
            classes=self.loader.classes,
        )
        if found is None:
            return session
        folder, manifest = found
        if as_pair(manifest.meta["img_size"]) != as_pair(self.img_size):
            carry(session, self.config, folder)
            log.info(
                "carried %s over from %s to %s px", folder.name, manifest.meta["img_size"], self.img_size
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

    def _end(self, status: Literal["finished", "preempted", "stopped"]) -> Outcome:
        self.reporter.end(status, self.step)
        return Outcome(status, self.step, self.samples_seen)

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.derived.last_step

    def close(self) -> None:
        """End the data workers. Not collective: also after a failure."""
        gc.enable()
        self.loader.close()
        if self._eval is not None:
            self._eval[1].close()
