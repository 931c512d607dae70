"""Scripts of completion: bash runs its own as Tab would; what it offers is what the parsers and the schema have."""

import shutil
import subprocess
import sys

import pytest

from dattrain.cli.completion import script, words_of
from dattrain.cli.main import VERBS
from dattrain.config.load import flatten
from dattrain.config.schema import Config

BASH = """
source "$1"; shift
COMP_LINE="$1" COMP_POINT=${#1}
_dattrain
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def words():
    return {verb: words_of(verb, *about) for verb, about in VERBS.items()}


def test_the_schema_and_the_parsers_are_offered_whole(words):
    keys = {key.partition("=")[0] for key in words["train"].keys}
    assert keys == set(flatten(Config()))
    assert "train.precision=bf16" in words["train"].keys and "optim.lr=" in words["train"].keys
    assert "demo/pretrain" in words["train"].first and "--nproc" in words["train"].options
    assert not words["eval"].keys and "--json" in words["eval"].options
    assert {"pack", "verify"} <= set(words["data"].first) and "--per-shard" in words["data"].options


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_bash_offers_what_can_follow(words, tmp_path):
    file = tmp_path / "dattrain.bash"
    file.write_text(script("bash", words))

    def tab(line):
        done = subprocess.run(["bash", "-uc", BASH, "bash", file, line], capture_output=True, text=True)
        assert done.stderr == "" and done.returncode == 0, done.stderr
        return done.stdout.split()

    assert tab("dattrain ev") == ["eval"] and set(VERBS) <= set(tab("dattrain "))
    assert tab("dattrain train demo/pre") == ["demo/pretrain"]
    assert tab("dattrain train demo/pretrain optim.wei") == ["optim.weight_decay="]
    assert tab("dattrain train demo/pretrain schedule.kind=c") == ["cosine", "constant"]
    assert tab("dattrain train demo/pretrain --np") == ["--nproc"]
    assert tab("dattrain eval --com") == ["--compare"]
    assert tab("dattrain eval runs/a optim") == [] and tab("dattrain ckpt ver") == ["verify"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_can_read_theirs(words, shell, tmp_path):
    text = script(shell, words)
    assert "optim.weight_decay=" in text and "schedule.kind=cosine" in text
    for line in text.splitlines() if shell == "fish" else ():
        assert line.startswith(("#", "complete -c dattrain ")) and line.replace("\\'", "").count("'") % 2 == 0
    (tmp_path / "script").write_text(text)
    if shutil.which(shell):
        subprocess.run([shell, "-n", tmp_path / "script"], check=True)


@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh")
def test_zsh_offers_what_can_follow(words, tmp_path):
    (tmp_path / "script").write_text(script("zsh", words))
    code = "compdef() {}; _files() {}; compadd() { print -l -- $@ }; source $1; words=(${@[2,-1]}); CURRENT=$#words; _dattrain"

    def tab(*typed):
        command = ["zsh", "-fc", code, "zsh", tmp_path / "script", *typed]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert set(VERBS) <= set(tab("dattrain", "x"))
    assert {"demo/pretrain", "optim.lr=", "schedule.kind=cosine"} <= set(tab("dattrain", "train", "x"))
    assert "demo/pretrain" not in tab("dattrain", "train", "demo/pretrain", "x")
    assert "--nproc" in tab("dattrain", "train", "--n") and "optim.lr=" not in tab("dattrain", "train", "--n")


def test_it_is_made_without_torch():
    code = "import sys; sys.modules['torch'] = None; from dattrain.cli.main import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "completion", "bash"], capture_output=True, text=True)
    assert done.returncode == 0 and "complete -o default -F _dattrain dattrain" in done.stdout, done.stderr
