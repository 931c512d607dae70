"""Whether DALI's device decoder works on this GPU, and who decodes there: asked in a child process, before the first batch.

nvImageCodec 0.9 is reported to fail on the regions of ordinary JPEGs, on some GPUs by a segmentation fault
(NVIDIA/nvImageCodec#55), which no Python code can catch: the rank would die at each restart. So a child decodes a few regions
with the pipeline of training first. nvImageCodec also hands what it cannot do to the CPU without a word; at its log level
3 it names the decoders that it takes, and that is what is read here.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import numpy as np
from PIL import Image

from dattrain.data.decode.dali_pipeline import Device, require, train_pipeline
from dattrain.errors import UserError

_SECONDS = 180.0
"""For the child: imports from a slow file system and a CUDA context take most of it."""

_IMAGES = 4
"""Enough that ``hw_decoder_load`` leaves some to the hardware engine and some to nvJPEG's CUDA decoder."""

_USABLE, _DECODED = "dattrain: the GPU can be used", "dattrain: decoded, mean difference"
_WRONG = 16.0
"""Levels of 255, the mean over a region: an order above what decoders differ by, and below any other picture."""

_PACKAGES = {
    "DALI": ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    "nvimgcodec": ("nvidia-nvimgcodec-cu13", "nvidia-nvimgcodec-cu12"),
    "nvjpeg": ("nvidia-nvjpeg", "nvidia-nvjpeg-cu12"),
}


def versions() -> str:
    """The installed packages that decode, in one line."""
    found = []
    for name, packages in _PACKAGES.items():
        for package in packages:
            with contextlib.suppress(PackageNotFoundError):
                found.append(f"{name} {version(package)}")
                break
        else:
            found.append(f"{name} of no known package")
    return ", ".join(found)


def remedy() -> str:
    """What is installed, and what to do where it does not decode."""
    return (
        f"this is {versions()}. Set data.decoder=cpu, or install another version: nvidia-dali-cuda130==2.2.0, which brings "
        "nvimgcodec 0.8, where 0.9 is installed (NVIDIA/nvImageCodec#55)"
    )


@lru_cache
def probe(device: Device) -> str:
    """Who decodes regions of an ordinary JPEG there, in words; asked once per process and ``device``.

    Raises:
        UserError: DALI is not installed; the decoder crashed, hung, failed, or gave other pixels than Pillow.
    """
    require()
    return examine(command(device), _SECONDS)


def command(device: Device) -> list[str]:
    """The child's command line."""
    program = (
        "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
        "from dattrain.data.decode.dali_probe import child; child(sys.argv[1])"
    )
    # Memory is taken for each thread.
    settings = asdict(replace(device, threads=min(2, device.threads), depth=1, preallocate=0))
    return [sys.executable, "-c", program, json.dumps(settings), json.dumps(sys.path)]


def examine(command: Sequence[str], seconds: float) -> str:
    """Run the child, for so long at most, and say who decoded. Raises UserError as ``probe``."""
    environment = {**os.environ, "DALI_NVIMGCODEC_LOG_LEVEL": "3"}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # A process that hangs in the driver may not even die of this: it is not waited for without end.
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        output.seek(0)
        text = re.sub(r"\x1b\[[0-9;]*m", "", output.read().decode(errors="replace"))
    return _verdict(code, text, seconds)


def _verdict(code: int | None, text: str, seconds: float) -> str:
    """What the child's exit status (None: it was killed for hanging) and its output mean."""
    lines = text.splitlines()
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")[:300]
    where = "DALI's device decoder, tried in a child process on regions of an ordinary JPEG,"
    if code is None:
        raise UserError(f"{where} did not come back in {seconds:g} s; {remedy()}")
    if code < 0:
        raise UserError(f"{where} crashed with {signal.Signals(-code).name}; {remedy()}")
    if code and _USABLE not in text:
        # Not the decoder's fault: a GPU in exclusive mode, say, lets no second process in.
        return f"unknown: the child process could not use the GPU ({last})"
    if code:
        raise UserError(f"{where} failed with exit code {code} ({last}); {remedy()}")
    difference = re.search(f"{_DECODED} ([0-9.]+)", text)
    if difference is None:
        return f"unknown: the child process said nothing of a decoded image ({last})"
    if float(difference[1]) > _WRONG:
        raise UserError(
            f"{where} gave pixels that are {difference[1]} levels of 255 from Pillow's in the mean; {remedy()}"
        )
    return who(text)


def who(text: str) -> str:
    """The decoders that nvImageCodec's log names for the images, and of how many where they are several.

    Decoders that work image by image announce each (``process #0``), and the last one that did so has succeeded. The
    hardware engine works by the batch and announces failures alone: it is the one where nobody else was asked.
    """
    engine = "create nvjpeg_hw_decoder" in text and f"decode num_samples={_IMAGES}" in text
    found: Counter[str] = Counter()
    for image in range(_IMAGES):
        asked = re.findall(rf"(\w+) process #{image}\b", text)
        if asked:
            name = asked[-1]
        elif engine and not re.search(rf" failed #{image}\b", text):
            name = "nvjpeg_hw_decoder"
        else:
            return "unknown: nvImageCodec's log does not name the decoder of every image"
        kind = "hardware engine" if "_hw_" in name else "GPU" if name.startswith("nvjpeg_cuda") else "CPU"
        found[f"{kind} ({name})"] += 1
    if len(found) == 1:
        return next(iter(found))
    return ", ".join(f"{name} {count} of {_IMAGES}" for name, count in found.most_common())


def child(settings: str) -> None:
    """The child process: decode regions on the device of ``settings``, a ``Device`` as JSON, and say how it went."""
    import resource

    import torch

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    device = Device(**json.loads(settings))
    if device.id is not None:
        torch.zeros(1, device=f"cuda:{device.id}")
    print(_USABLE, flush=True)
    picture, content = _jpeg()
    height, width = 224, 224
    corners = np.array([(52 + 5 * i, 100 + 7 * i) for i in range(_IMAGES)], dtype=np.int32)
    inputs = (
        [np.frombuffer(content, dtype=np.uint8)] * _IMAGES,
        corners,
        np.array([(height, width)] * _IMAGES, dtype=np.int32),
        np.zeros(_IMAGES, dtype=np.int32),
    )
    pipeline = train_pipeline(lambda: inputs, _IMAGES, (height, width), "bilinear", device)
    (output,) = pipeline.run()
    pixels = (output.as_cpu() if device.id is not None else output).as_array()
    expected = np.stack([picture[top : top + height, left : left + width] for top, left in corners])
    difference = np.abs(np.asarray(pixels).astype(int) - expected).mean((1, 2, 3)).max()
    print(f"{_DECODED} {difference:.3f}", flush=True)
    # Whatever the libraries do when they are taken down is not the question.
    sys.stdout.flush()
    os._exit(0)


def _jpeg() -> tuple[np.ndarray, bytes]:
    """A JPEG like ImageNet's, 375 x 500 baseline 4:2:0: its pixels as Pillow decodes them, and the file."""
    y, x = np.mgrid[0:375, 0:500]
    waves = [127 + 60 * np.sin(x / a) + 60 * np.cos(y / b) for a, b in ((31, 47), (53, 29), (41, 37))]
    buffer = io.BytesIO()
    Image.fromarray(np.stack(waves, -1).astype(np.uint8)).save(
        buffer, "JPEG", quality=90, subsampling="4:2:0"
    )
    return np.asarray(Image.open(buffer).convert("RGB")), buffer.getvalue()
