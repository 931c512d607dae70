"""Stage ``dali``: regions of three kinds of JPEG by DALI's decoder, each kind in a process of its own, since it may crash.

``python -m benchmarks.gpu.dali KIND COUNT DEVICE FILE`` is that process.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.gpu.job import Job, NotRun

KINDS: dict[str, dict[str, Any]] = {
    "4:2:0": {"subsampling": "4:2:0"},
    "4:4:4": {"subsampling": "4:4:4"},
    "progressive": {"subsampling": "4:2:0", "progressive": True},
}
LOG_LEVEL = "DALI_NVIMGCODEC_LOG_LEVEL"
WATCHED = 4
"""Images of the process that is asked who decodes: so many that the hardware engine and the CUDA decoder get some each, and as many
as ``dattrain.data.decode.dali_probe`` reads of."""


def run(job: Job) -> None:
    """Per kind: who decodes a few images, then the speed and the distance to Pillow's pixels of many."""
    if find_spec("nvidia") is None or find_spec("nvidia.dali") is None:
        raise NotRun("DALI is not installed here (in the checkout: pip install -e '.[dali]')")
    broken = 0
    for kind in list(KINDS)[: 1 if job.dry else None]:
        # nvImageCodec says at this level who decodes, and is slowed down by it.
        code, text, _ = child(job, kind, WATCHED, {LOG_LEVEL: "3"})
        job.figure(f"{kind}: decoded by", who(text) if code == 0 else how(code, text))
        code, text, found = child(job, kind, 8 if job.dry else 2048, {})
        if code or not found:
            broken += 1
            job.figure(f"{kind}: ended", how(code, text))
            continue
        job.figure(f"{kind}: regions decoded and resized", found["images_per_s"], "images/s")
        job.figure(f"{kind}: mean distance to Pillow's", found["distance"], "levels of 255")
    job.figure("kinds of JPEG that were not decoded", broken)


def child(job: Job, kind: str, count: int, environ: dict[str, str]) -> tuple[int | None, str, dict[str, Any]]:
    """Exit code (None: it hung), output and findings of a process that decodes ``count`` images."""
    file = job.folder / f"{kind.replace(':', '')}-{count}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu.dali", kind, str(count), job.device, str(file)]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60 if job.dry else 25,
        )
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, output = None, error.stdout or b""
    text = re.sub(r"\x1b\[[0-9;]*m", "", output.decode("utf-8", errors="replace"))
    print(text[-20_000:], flush=True)
    return code, text, json.loads(file.read_text()) if file.exists() else {}


def how(code: int | None, text: str) -> str:
    """How a process ended that did not decode."""
    if code is None:
        return "did not come back"
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")[:200]
    return f"died of signal {-code}" if code < 0 else f"exit code {code}: {last}"


def who(text: str) -> str:
    """The decoder by nvImageCodec's log, as the package reads it."""
    if find_spec("dattrain.data.decode.dali_probe") is None:
        return "not known: this tree cannot read the decoder's log"
    from dattrain.data.decode import dali_probe

    return dali_probe.who(text)


def jpegs(kind: str, count: int) -> list[bytes]:
    """JPEGs of 375 x 500 pixels and about the weight of ImageNet's, a few different ones over and over."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(min(count, 16)):
        small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize((500, 375), Image.Resampling.BICUBIC)).astype(float)
        noisy = np.clip(smooth + rng.normal(0, 7, (375, 500, 1)), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "JPEG", quality=90, **KINDS[kind])
        files.append(buffer.getvalue())
    return [files[i % len(files)] for i in range(count)]


def decode(kind: str, count: int, device: str, file: Path) -> None:
    """Decode, and write what was found."""
    import torch

    from dattrain.data.decode.dali_pipeline import Device, train_pipeline

    if device == "cuda":
        torch.zeros(1, device="cuda")
    batch = min(count, 64)
    files = jpegs(kind, batch)
    top, left, height, width = 52, 100, 224, 224
    inputs = (
        [np.frombuffer(data, dtype=np.uint8) for data in files],
        np.tile(np.array([[top, left]], dtype=np.int32), (batch, 1)),
        np.tile(np.array([[height, width]], dtype=np.int32), (batch, 1)),
        np.zeros(batch, dtype=np.int32),
    )
    where = Device(
        id=0 if device == "cuda" else None, threads=4, depth=2, hw_decoder_load=0.65, preallocate=0
    )
    pipeline = train_pipeline(lambda: inputs, batch, (height, width), "bicubic", where)
    (output,) = pipeline.run()
    pixels = np.asarray((output.as_cpu() if device == "cuda" else output).as_array())
    wanted = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in files]
    wanted = [x[top : top + height, left : left + width].astype(int) for x in wanted]
    distance = float(np.mean([np.abs(a.astype(int) - b).mean() for a, b in zip(pixels, wanted)]))
    rounds = count // batch
    begin = time.perf_counter()
    for _ in range(rounds):
        pipeline.run()
    if device == "cuda":
        torch.cuda.synchronize()
    found = {"images_per_s": rounds * batch / (time.perf_counter() - begin), "distance": distance}
    file.write_text(json.dumps(found))
    # Whatever the libraries do when they are taken down is not the question.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    decode(sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
