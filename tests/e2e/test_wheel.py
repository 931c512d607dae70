"""What ``pip install .`` gives to someone who has no checkout: the wheel in an environment of its own, run elsewhere."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "unit"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that nothing of an earlier build gets in."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("dattrain", "configs", "launch"):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    out = tmp_path_factory.mktemp("wheel")
    build = [
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--disable-pip-version-check",
        "-q",
        "-w",
        out,
        source,
    ]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True, timeout=300)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def command(wheel, tmp_path_factory):
    """Runs the installed ``dattrain`` in a folder that has nothing to do with the checkout."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, symlinks=True)
    site = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    # The dependencies are this environment's; its own dattrain, which is editable, is not found by a .pth of a .pth.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = ["install", "--no-deps", "--no-index", "--disable-pip-version-check", "-q", wheel]
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", home / "bin" / "python", *install], check=True, timeout=300
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "COV"))}
    # A new home, but the machine's cache: compiling the library takes half a minute.
    clean.setdefault("XDG_CACHE_HOME", str(Path.home() / ".cache"))

    def run(cwd: Path, *words: str, program: str = "dattrain") -> str:
        done = subprocess.run(
            [home / "bin" / program, *words], cwd=cwd, capture_output=True, text=True, timeout=500,
            env={**clean, "HOME": str(cwd), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    return run


def test_it_holds_one_package_with_everything_in_it(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {re.sub(r"-.*\.dist-info$", "", name.split("/")[0]) for name in names} == {"dattrain"}
    for folder in ("dattrain", "configs", "launch"):
        for path in (ROOT / folder).rglob("*"):
            name = path.relative_to(ROOT).as_posix()
            inside = name if folder == "dattrain" else f"dattrain/{name}"
            if path.is_file() and "__pycache__" not in name and inside != "dattrain/launch/submit.py":
                assert inside in names, f"{name} is not in the wheel"


def test_recipes_and_chains_are_found_by_their_names(command, tmp_path):
    listed = command(tmp_path, "config", "list")
    assert "scratch/in1k_dat_tiny_224" in listed and "in22k_to_in1k_384" in listed
    assert str(ROOT) not in listed
    planned = command(
        tmp_path, "submit", "in22k_to_in1k_384", "--cluster", "generic", "--nodes", "2", "--dry-run",
        "pretrain.data.train=22k", "finetune.data.train=1k", "finetune.data.val=val",
    )  # fmt: skip
    assert "#SBATCH" in planned and str(ROOT) not in planned


def test_it_trains_a_recipe_by_its_name(command, tmp_path):
    """In a folder where only images are."""
    for i in range(8):
        folder = tmp_path / "images" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (30 * i, 90, 120)).save(folder / f"{i}.png")
    command(
        tmp_path, "train", "in1k_dat_tiny_224", "data.train=images", "data.val=null", "data.labels=null", "--run", "run",
        "model.name=dat_atto", "model.num_classes=2", "model.img_size=32", "train.max_steps=2",
        "train.global_batch=4", "train.micro_batch=4", "data.workers=0", "train.precision=fp32", "zero.stage=0",
    )  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert json.loads((tmp_path / "run" / "code.json").read_text())["revision"] is None


def test_the_first_hour(command, tmp_path):
    """From a folder of pictures to weights that timm loads, by the commands that each one's last lines name."""
    from fashion_images import image_folder

    image_folder(tmp_path / "my photos", 60, names=("cat", "dog") * 5)
    said = command(tmp_path, "train", "--data", "my photos", "--run", "first", "train.max_steps=4")
    screen, lines = said.split("step 4/")[0], said.splitlines()
    assert "classes  2: cat" in screen and "rate" in screen
    assert lines[-1] == "run folder: first" and any(line.startswith("top1: best ") for line in lines)
    following = [shlex.split(line) for line in lines if line.startswith("  dattrain ")]
    assert [words[1] for words in following] == ["eval", "predict", "report", "export"]
    for words in following:
        command(tmp_path, *words[1:])
    command(
        tmp_path,
        "finetune",
        "first@best",
        "--data",
        "my photos",
        "model.img_size=96",
        "--run",
        "second",
        "train.max_steps=2",
    )
    command(tmp_path, "report", "first", "second", "--out", "both.html")
    assert (tmp_path / "both.html").stat().st_size > 50_000 and (tmp_path / "first" / "results.png").exists()
    command(tmp_path, "export", "second", "--to", "hub", "hub")
    code = "\n".join(
        [
            "import dattrain.models, timm, torch",
            'model = timm.create_model("local-dir:hub", pretrained=True).eval()',
            'print(model(torch.zeros(1, 3, 96, 96)).shape[1], *model.pretrained_cfg["label_names"])',
        ]
    )
    loaded = command(tmp_path, "-c", code, program="python")
    assert loaded.split() == ["2", "cat", "dog"]


def test_the_demo_goes_the_whole_road(command, tmp_path):
    """A few small steps a stage and one shard to evaluate: it runs, is killed, resumed, drawn."""
    out = tmp_path / "out"
    shown = command(
        tmp_path, "demo", "--out", "out", "--nproc", "1", "train.max_steps=8", "checkpoint.every_steps=3",
        "train.global_batch=16", "train.micro_batch=16", "data.val=out/shards/val-*0.tar",
    )  # fmt: skip
    assert "killed on purpose" in shown and "resumed from" in shown
    assert re.search(r"1-nearest neighbour on pixels +80\.75 %", shown)
    rows = (out / "pretrain" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in rows]
    assert steps == sorted(steps) and steps[-1] == 8
    assert Image.open(out / "demo.png").width > 1000
    shown = command(
        tmp_path, "demo", "segment", "--out", "dense", "--init", "out/finetune", "--nproc", "1", "train.max_steps=6",
        "checkpoint.every_steps=2", "data.val=dense/scene-shards/val-0000.tar",
    )  # fmt: skip
    assert "killed on purpose" in shown and "resumed from" in shown
    result = json.loads((tmp_path / "dense" / "result.json").read_text())
    assert set(result) == {"miou", "miou_scratch"} and all(0 < value < 100 for value in result.values())
    assert Image.open(tmp_path / "dense" / "segment.png").width > 1000
