"""``dattrain train``: a recipe or a run folder, in this process or as local ranks."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path

from dattrain.cli import own_images
from dattrain.cli.loading import loading
from dattrain.cli.run_argument import run_folder
from dattrain.errors import ConfigError, UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG|RUN", help="a recipe (YAML), or a run folder to resume"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optim.lr=1e-3")
    own_images.add_data_argument(parser)
    add_run_arguments(parser)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """``--run`` and ``--nproc``."""
    parser.add_argument(
        "--run",
        # torchrun takes --run for an abbreviation of its own --run-path, even behind the script's name.
        "--run-dir",
        dest="run_dir",
        metavar="DIR",
        type=run_folder,
        help="the run folder; an existing one is resumed (default: runs/<recipe>-<time>)",
    )
    parser.add_argument(
        "--nproc",
        type=int,
        help="local ranks to start (default: this process, or what torchrun or srun started)",
    )


def run(args: argparse.Namespace) -> int:
    """Train; returns 0, or 75 where a preemption was saved and wants to be started again."""
    from dattrain.config.run import is_rank, resolve

    if args.data is not None:
        args.run_dir = own_images.begin(args)
    elif args.config is None:
        raise ConfigError("name a recipe (`dattrain config list`), a run folder, or images by --data FOLDER")
    config, run_dir = resolve(args.config, args.overrides, args.run_dir, os.environ)
    if args.nproc is not None:
        if is_rank(os.environ):
            raise ConfigError(
                "--nproc starts ranks, but this process is one already (torchrun or srun started it)"
            )
        return spawn(args, run_dir)
    with loading("torch, DeepSpeed", always=True):
        from dattrain.report.training import train
        from dattrain.runtime.environment import hard_exit
        from dattrain.runtime.spawn import report
        from dattrain.submit.history import history

    try:
        code = train(config, run_dir, history).exit_code
    except UserError as error:
        report(f"dattrain train: {error}")
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        # Without Python's finalisation nothing else would print it.
        report(traceback.format_exc())
        code = 1
    hard_exit(code)


def spawn(args: argparse.Namespace, run_dir: Path) -> int:
    """Start ``--nproc`` ranks of this very command."""
    from dattrain.runtime.spawn import launch

    if args.nproc < 1:
        raise ConfigError(f"--nproc {args.nproc} must be at least 1")
    command = [sys.executable, "-m", "dattrain", "train", args.config, *args.overrides, "--run", str(run_dir)]
    return launch(command, args.nproc)
