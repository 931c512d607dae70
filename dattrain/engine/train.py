"""Training as a process does it: run folder, logs, signals, process group and watchdog around a ``trainer.Trainer``."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch.distributed as dist

from dattrain.config.run import absolute
from dattrain.config.schema import Config
from dattrain.engine import resume_rules, starts, zero
from dattrain.engine.rank_zero import Claim
from dattrain.engine.trainer import Outcome, Trainer
from dattrain.errors import UserError
from dattrain.files import shown
from dattrain.runtime import collectives, environment, preflight, process
from dattrain.runtime.environment import Env
from dattrain.runtime.health import Watchdog
from dattrain.runtime.logging import RankLog
from dattrain.runtime.signals import STOP_FILE, Preemption
from dattrain.urls import mask

log = logging.getLogger(__name__)

EMULATED = (
    "train.precision={} is emulated on this CPU (it has neither AVX512_BF16 nor AMX), about four times slower than fp32: use "
    "train.precision=fp32"
)


OnEvaluation = Callable[[Path], None]
"""Called on rank 0 with the run folder once an evaluation is written down; the other ranks train on meanwhile."""


def train(
    config: Config,
    run_dir: Path,
    *,
    env: Env | None = None,
    on_evaluation: OnEvaluation = lambda run_dir: None,
) -> Outcome:
    """Train ``config`` in ``run_dir``, resuming at its newest complete checkpoint. Every rank of the job calls it.

    Joins the process group (and leaves it) unless the caller has done so. Signals that preempt are caught meanwhile and
    the handlers before restored; the caller requeues (``Outcome.status``). The run folder is this job's alone until it returns.

    Raises:
        InUse: (a UserError, on every rank) another job trains in ``run_dir``, or has taken it over.
        UserError: what the user can put right: data, settings, disk, a run that no longer yields finite steps.
    """
    run_dir, config = run_dir.absolute(), absolute(config)
    resume_rules.check_folder(run_dir)
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
        refused = False
        stack.callback(lambda: claim.release(undo=refused))
        log_file = RankLog(run_dir, env.rank, env.host)
        stack.callback(log_file.close)
        health = config.train.health
        watchdog = Watchdog(
            health.stall_seconds, run_dir, log_file.file, env.rank, env.host, env.world
        ).start()
        stack.callback(watchdog.close)
        trainer: Trainer | None = None
        try:
            log.info("run folder: %s", shown(run_dir))
            # A job may be told to stop while it waits; its submission clears what is older.
            by_hand = env.rank == 0 and env.launcher in starts.BY_HAND
            if by_hand and preemption.clear_old_stop_file(process.began()):
                log.warning("%s was left from before this start; it is removed", run_dir / STOP_FILE)
            if device.type == "cpu" and settings.precision.startswith("bf16") and environment.emulates_bf16():
                log.warning("%s", EMULATED.format(settings.precision))
            alone = not dist.is_initialized()
            if alone:
                preflight.reach(env)
                # Longer than the watchdog's patience: it names who is silent, a collective's timeout does not.
                patience = max(1800.0, 2 * health.stall_seconds)
                stack.enter_context(
                    environment.process_group(env, device, patience, disconnect=zero.destroy_process_group)
                )
            collectives.from_first(claim.check)
            if alone:
                for line in preflight.check(env, run_dir).lines():
                    log.info("%s", line, extra={"console": False})
            watchdog.attempt = collectives.broadcast(secrets.token_hex(8))
            trainer = Trainer(
                config, run_dir, env, device, preemption, watchdog, log_file.console, stack, claim.owner,
                on_evaluation,
            )  # fmt: skip
            outcome = trainer.run()
            dist.barrier()
        except UserError as error:
            log.error("%s", error, extra={"console": False})
            # Nothing has been trained: a folder that this start has made would only be in the way of the next.
            refused = trainer is None
            _note_failure(claim, trainer, "failed", str(error))
            raise
        except KeyboardInterrupt:
            _note_failure(
                claim, trainer, "stopped", "Ctrl-C, at once: what came after the last checkpoint is lost"
            )
            raise
        except BaseException as error:
            log.exception("rank %d on %s failed", env.rank, env.host, extra={"console": False})
            _note_failure(claim, trainer, "failed", f"{type(error).__name__}: {error}")
            raise
    return outcome


def _note_failure(claim: Claim, trainer: Trainer | None, status: str, why: str) -> None:
    """Note what has ended the training, where this is the rank that owns the run folder. Not collective."""
    if claim.owner is not None and not claim.owner.lost:
        starts.end(claim.owner.path.parent, status, why, None if trainer is None else trainer.step)
        if trainer is not None:
            trainer.reporter.event("end", trainer.step, status=status, error=mask(why)[:2000])
