"""Habits of other tools are answered by one message with the spelling that works here."""

import re

import pytest

from dattrain.cli.main import VERBS, main
from dattrain.cli.suggest import VERBS as HABITS
from dattrain.config.habits import KEYS
from dattrain.config.load import flatten
from dattrain.config.schema import Config

RECIPE = "demo/pretrain"


def said(capsys, *words):
    """The message; argparse's exit and a returned code are alike for a person."""
    try:
        code = main(list(words))
    except SystemExit as end:
        code = end.code
    assert code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "right"),
    [
        ("fit x", "did you mean dattrain train?"),
        ("resume runs/a", "did you mean dattrain train RUN?"),
        ("trian x", "did you mean dattrain train?"),
        ("recipe.yaml", "did you mean dattrain train recipe.yaml?"),
        (f"train {RECIPE} --epochs 10", "schedule.epochs=10"),
        (f"train --epochs 10 {RECIPE}", "schedule.epochs=10"),
        (f"train {RECIPE} --lr=0.1", "optim.lr=0.1"),
        (f"train {RECIPE} --lr", "optim.lr=VALUE"),
        (f"train {RECIPE} --batch-size 64", "train.global_batch=64"),
        (f"train {RECIPE} --optim.lr 3", "optim.lr=3"),
        (f"train {RECIPE} --resume", "dattrain train RUN"),
        (f"train {RECIPE} --device cuda", "--nproc N"),
        (f"train {RECIPE} --gpus 2", "--nproc N"),
        (f"train {RECIPE} --output out", "--run DIR"),
        (f"train --config {RECIPE}", "dattrain train RECIPE"),
        (f"submit {RECIPE} --epochs 3", "schedule.epochs=3"),
        ("eval runs/a --batch-size 3", "did you mean --batch?"),
        ("eval --checkpoint runs/a", "dattrain eval RUN"),
        ("predict x.jpg --weights runs/a", "did you mean --checkpoint?"),
        (f"train {RECIPE} lr=1e-3", "did you mean optim.lr?"),
        (f"train {RECIPE} batch_size=64", "did you mean train.global_batch?"),
        (f"train {RECIPE} epochs=5", "did you mean schedule.epochs?"),
        (f"train {RECIPE} optim.epochs=5", "did you mean schedule.epochs?"),
        (f"train {RECIPE} optim.learningRate=5", "did you mean optim.lr?"),
        (f"train {RECIPE} model=dat_tiny", "did you mean model.name=dat_tiny?"),
        (f"train {RECIPE} data=photos", "did you mean data.train=photos?"),
    ],
)
def test_one_message_gives_the_spelling_here(capsys, words, right):
    assert right in said(capsys, *words.split())


def test_what_is_like_nothing_is_not_guessed_and_abbreviations_stay(capsys):
    assert "unrecognized arguments: --zzz" in said(capsys, "train", RECIPE, "--zzz", "3")
    assert "did you mean" not in said(capsys, "zzzzzz")
    # --nproc 0 is refused for its value, so the abbreviation was understood.
    assert "--nproc 0 must be at least 1" in said(capsys, "train", RECIPE, "data.train=x", "--npr", "0")


def test_every_answer_is_there():
    """Keys and verbs that the tables lead to exist, and no name leads to two."""
    assert set(KEYS) <= set(flatten(Config()))
    names = [name for listed in KEYS.values() for name in listed.split()]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[a-z0-9_]+", name) for name in names)
    assert {ours.split()[0] for ours in HABITS} <= set(VERBS)
    assert not {name for theirs in HABITS.values() for name in theirs.split()} & set(VERBS)
