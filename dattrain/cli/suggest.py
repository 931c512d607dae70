"""What was meant by a verb or an option that is not there: one message that gives the spelling here."""

from __future__ import annotations

import argparse
import difflib
import shlex
from collections.abc import Collection, Sequence

VERBS = {
    "train": "fit run start pretrain training tune",
    "train RUN": "resume continue",
    "train RECIPE init.from=WEIGHTS": "transfer",
    "eval": "test validate val evaluate validation score benchmark-accuracy",
    "predict": "infer inference classify detect",
    "viz": "visualize visualise draw plot attention show-points",
    "submit": "launch sbatch queue slurm schedule",
    "status": "ps list ls runs squeue jobs info",
    "logs": "log tail",
    "cancel": "kill scancel abort",
    "stop": "pause halt",
    "plan": "estimate memory summary",
    "config show": "show print-config",
    "config list": "recipes models configs zoo",
    "doctor": "env check diagnose system collect-env version",
    "export": "convert save",
    "import": "load download",
    "data pack": "pack prepare shard",
    "ckpt ls": "checkpoints checkpoint",
    "bench": "benchmark profile speed",
}
"""Verbs of ours (with what follows them) to what others call them."""
RUN_DIR = "--run DIR, the run folder (default: runs/RECIPE-TIME)"
RESUME = "dattrain train RUN, with the run folder in the recipe's place: it goes on from its last checkpoint"
DEVICES = "--nproc N, a rank per device; CUDA_VISIBLE_DEVICES chooses which (docs/train.md)"
OPTIONS = {
    RUN_DIR: "output output-dir out out-dir save-dir project name exp experiment logdir log-dir work-dir dir folder default-root-dir",
    RESUME: "resume auto-resume continue resume-from ckpt-path checkpoint",
    DEVICES: "gpus gpu devices device num-gpus ngpus nproc-per-node num-processes world-size",
    "dattrain submit RECIPE --nodes N": "nodes num-nodes nnodes",
    "the recipe as the first word, without an option: dattrain train RECIPE": "config cfg config-file c recipe",
    "a word of its own: KEY=VALUE": "set opts override cfg-options",
    "dattrain eval RUN": "eval evaluate test validate val-only eval-only",
    "nothing to set: AdamW is the optimizer": "opt optimizer optim",
}
"""What is said of options of others for ``train``, to those options."""
WEIGHTS = "checkpoint ckpt weights model model-path model-checkpoint pretrained resume run"
"""What others call the weights of a verb that takes them as its first word, or as ``--checkpoint``."""
TAKES_KEYS = ("train", "submit", "plan", "finetune")
"""Verbs whose options of other tools are settings here."""


def verb(word: str, known: Collection[str]) -> str:
    """The message for a verb that is not there."""
    if word.endswith((".yaml", ".yml")) or "/" in word:
        return f"{word} is no verb; did you mean dattrain train {shlex.quote(word)}?"
    plain = word.lower()
    found = next((ours for ours, theirs in VERBS.items() if plain in theirs.split()), None)
    near = found or next(iter(difflib.get_close_matches(plain, known, 1)), None)
    hint = f"did you mean dattrain {near}? " if near else ""
    return f"there is no verb {word}; {hint}Verbs: {', '.join(known)}"


def option(word: str, value: str | None, verb: str, parser: argparse.ArgumentParser) -> str | None:
    """What to write instead of an option that ``verb`` does not have; None where nothing is like it.

    Args:
        word: as typed, perhaps with ``=value``.
        value: the next word, where it may be the option's value.
    """
    from dattrain.config.habits import meant
    from dattrain.config.load import flatten
    from dattrain.config.schema import Config

    name, equals, given = word.partition("=")
    plain = name.lstrip("-").replace("_", "-").lower()
    known = options(parser)
    if f"--{plain}" in known:
        return f"{word}: did you mean --{plain}?"
    if verb in TAKES_KEYS:
        for text, theirs in OPTIONS.items():
            if plain in theirs.split():
                return f"{word}: here that is {text}"
        keys = meant(plain, flatten(Config()))
        if keys:
            shown = given if equals else value
            written = " or ".join(f"{key}={'VALUE' if shown is None else shlex.quote(shown)}" for key in keys)
            return f"{word}: settings are words without dashes, by section: {written}"
    if plain in WEIGHTS.split():
        if "--checkpoint" in known:
            return f"{word}: did you mean --checkpoint?"
        if any(action.dest == "model" and not action.option_strings for action in parser._actions):
            return f"{word}: weights are the first word, without an option: dattrain {verb} RUN"
    near = difflib.get_close_matches(f"--{plain}", known, 1, cutoff=0.7)
    # --batch-size for --batch.
    near = near or [each for each in known if len(each) > 4 and f"--{plain}".startswith(f"{each}-")][:1]
    return f"{word}: did you mean {near[0]}?" if near else None


def unknown_option(argv: Sequence[str], verb: str, parser: argparse.ArgumentParser) -> str | None:
    """The message for the first option among the words behind the verb that it does not have; None where it has all, or nothing is like it.

    Verbs with actions of their own are left to argparse, and so are abbreviations.
    """
    if any(isinstance(action, argparse._SubParsersAction) for action in parser._actions):
        return None
    known = options(parser)
    for number, word in enumerate(argv):
        name = word.partition("=")[0]
        dashed = len(name) > 1 and name.startswith("-") and not name.lstrip("-")[:1].isdigit()
        if word == "--":
            return None
        if not dashed or name in known or any(each.startswith(name) for each in known):
            continue
        following = argv[number + 1] if number + 1 < len(argv) else "-"
        message = option(word, None if following.startswith("-") else following, verb, parser)
        if message is not None:
            return message
    return None


def options(parser: argparse.ArgumentParser) -> list[str]:
    """The options of a parser."""
    return [option for action in parser._actions for option in action.option_strings]
