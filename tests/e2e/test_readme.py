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
def shards(tmp_path_factory) -> Path:
    """Two shards with 8 photographs' worth of samples, without indexes, as a download would leave them."""
    folder = tmp_path_factory.mktemp("imagenet22k")
    for number in range(2):
        with tarfile.open(folder / f"imagenet22k-train-{number:04d}.tar", "w") as tar:
            for item in range(4):
                picture = io.BytesIO()
                Image.new("RGB", (64, 48), (40 * item, 90, 30 * number)).save(picture, "JPEG")
                for suffix, data in (("jpg", picture.getvalue()), ("cls", str(item).encode())):
                    member = tarfile.TarInfo(f"{number}_{item}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


def test_from_there_to_imagenet(shards, tmp_path):
    for line in blocks()[1]:
        words = shlex.split(line.replace("/data/imagenet22k", str(shards)), comments=True)
        assert words[0] == "dattrain"
        if words[1] == "submit" and "--dry-run" not in words:
            continue  # tests/slurm submits for real
        if words[1] == "status":  # nothing was submitted, which it says
            done = warm.run([sys.executable, "-m", *words], cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 2 and "no run folder" in done.stderr
            continue
        run([sys.executable, "-m", *words], home=tmp_path)
    assert len(list(shards.glob("*index*"))) >= 2
