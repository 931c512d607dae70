"""The README's commands are run as they stand there, on what they can reach here."""

import io
import os
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import warm
from PIL import Image

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def run(words, **kwargs):
    # With the machine's cache, where the compiled library is.
    cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    home = str(kwargs.pop("home", Path.home()))
    env = {**os.environ, "HOME": home, "XDG_CACHE_HOME": cache, "OMP_NUM_THREADS": "1"}
    start = warm.run if words[0] == sys.executable else subprocess.run
    done = start(words, cwd=ROOT, env=env, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, (
        f"{shlex.join(map(str, words))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    return done.stdout


def blocks():
    return [b.splitlines() for b in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)]


def test_make_knows_the_two_commands_and_they_do_what_the_readme_says():
    commands = [shlex.split(line, comments=True) for line in blocks()[0]]
    assert commands == [["make", "demo"], ["make", "test"]]
    assert "dattrain demo" in run(["make", "-n", "demo"])  # which tests/e2e/test_wheel.py runs
    assert "-m pytest" in run(["make", "-n", "test"])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """ImageNet-22K and -1K with an update's worth of samples each, without indexes, as a download would leave them."""
    folder = tmp_path_factory.mktemp("data")
    picture = io.BytesIO()
    Image.new("RGB", (16, 12), (40, 90, 30)).save(picture, "JPEG")
    for name, count in (("imagenet22k", 4096), ("imagenet1k/train", 1024), ("imagenet1k/val", 8)):
        (folder / name).mkdir(parents=True)
        for number in range(2):
            with tarfile.open(folder / name / f"imagenet-train-{number:04d}.tar", "w") as tar:
                for item in range(count // 2):
                    for suffix, content in (("jpg", picture.getvalue()), ("cls", str(item % 4).encode())):
                        member = tarfile.TarInfo(f"{number}_{item}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
    return folder


def test_from_there_to_imagenet(data, tmp_path):
    said: dict[str, str] = {}
    shown: list[str] = []
    for line in "\n".join(blocks()[1]).replace("\\\n", " ").splitlines():
        words = shlex.split(line.replace("/data/", f"{data}/"), comments=True)
        if not words:
            continue
        assert words[0] == "dattrain"
        if words[1] == "submit" and "--dry-run" not in words:
            assert words == shown[:-1]  # what was shown; tests/slurm submits for real
            continue
        if words[1] == "status":  # nothing was submitted, which it says
            done = warm.run([sys.executable, "-m", *words], cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 2 and "no run folder" in done.stderr
            continue
        shown = words
        said[words[1]] = run([sys.executable, "-m", *words], home=tmp_path)
    assert len(list(data.glob("imagenet22k/*index*"))) >= 2
    # As planned, so submitted: the devices, and how the batch is divided over them.
    for batch in ("4096 = 32 device(s) x 128 x 1", "1024 = 32 device(s) x 32 x 1"):
        assert f"batch {batch} accumulated" in said["submit"]
        assert f"batch {batch.replace('device(s)', 'devices')} accumulated" in said["plan"]
    assert said["submit"].count("#SBATCH --gpus-per-node=8") == 3
