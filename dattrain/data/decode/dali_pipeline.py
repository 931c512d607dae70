"""The DALI pipelines of training, evaluation and dense training, and which files are given to them."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dattrain.config.data_sections import Data
from dattrain.errors import UserError

_TAIL = 64
"""Bytes at the end of a file in which its end marker is looked for; some writers pad."""


_LARGEST = {
    "device_memory_padding": 211_025_920,
    "host_memory_padding": 140_544_512,
    "preallocate_width_hint": 5980,
    "preallocate_height_hint": 6430,
}
"""Buffers, in bytes, and pixels that fit ImageNet-1K's largest images, so that none makes nvJPEG allocate anew (which stops the
device): the values of NVIDIA's own ImageNet example (DALI, docs/examples/use_cases/pytorch/resnet50; NVIDIA/DALI#3029)."""


@dataclass(frozen=True)
class Device:
    """Where and how a pipeline runs.

    Attributes:
        id: of the GPU; None is the CPU.
        threads: of the CPU part.
        depth: batches that are held ready.
        hw_decoder_load: share of the JPEGs given to the hardware decoder.
        preallocate: bytes of device memory taken at the start.
    """

    id: int | None
    threads: int
    depth: int
    hw_decoder_load: float
    preallocate: int


def device_of(index: int | None, data: Data) -> Device:
    """The settings of ``data`` on CUDA device ``index``; None is the CPU."""
    return Device(
        id=index,
        threads=data.dali_threads,
        depth=data.prefetch,
        hw_decoder_load=data.dali_hw_decoder_load,
        preallocate=data.dali_preallocate_mb * 10**6,
    )


def train_pipeline(
    source: Callable[[], tuple[Any, ...]],
    batch: int,
    size: tuple[int, int],
    interpolation: str,
    device: Device,
) -> Any:
    """Decode a region, resize it, flip it.

    ``source`` gives (files, B x 2 int32 top and left, B x 2 int32 height and width, B int32 flips). DALI reads these arrays in
    place: whoever gives them holds them, unchanged, until the batch's output is there. The output is
    B x height x width x 3 uint8.
    """
    fn, types = require()

    def graph() -> Any:
        files, start, shape, flip = fn.external_source(source=source, num_outputs=4, batch=True, no_copy=True)
        pixels = fn.decoders.image_slice(
            files, start=start, shape=shape, axes=(0, 1), **_decoding(types, device)
        )
        pixels = fn.resize(pixels, size=size, **_resizing(types, interpolation))
        return fn.flip(pixels, horizontal=flip)

    return _built(graph, batch, device)


def eval_pipeline(
    source: Callable[[], tuple[Any, ...]],
    batch: int,
    size: tuple[int, int],
    interpolation: str,
    device: Device,
) -> Any:
    """Decode, crop, resize; the crop's edges lie between pixels, and the filter reads beyond them.

    So memory is of the order of the image and of ``size``, while the resized form of a thin image would be thousands of times
    that. ``source`` gives (files, B x 2 float32 top and left, B x 2 float32 bottom and right, in pixels of the file),
    to be held as for ``train_pipeline``.
    """
    fn, types = require()

    def graph() -> Any:
        files, start, end = fn.external_source(source=source, num_outputs=3, batch=True, no_copy=True)
        pixels = fn.decoders.image(files, **_decoding(types, device))
        return fn.resize(pixels, size=size, roi_start=start, roi_end=end, **_resizing(types, interpolation))

    return _built(graph, batch, device)


def dense_pipeline(
    source: Callable[[], tuple[Any, ...]], batch: int, interpolation: str, device: Device
) -> Any:
    """Decode, take a part at a size of its own, flip; smaller results are padded with 0 at the right and at the bottom.

    ``source`` gives (files, B x 2 float32 top and left, B x 2 float32 bottom and right, in pixels of the file, B x 2 float32 height
    and width of the result, B int32 flips), to be held as for ``train_pipeline``. The filter reads beyond the part's edges. The output
    is B x the largest height x the largest width x 3 uint8.
    """
    fn, types = require()

    def graph() -> Any:
        files, start, end, size, flip = fn.external_source(
            source=source, num_outputs=5, batch=True, no_copy=True
        )
        pixels = fn.decoders.image(files, **_decoding(types, device))
        pixels = fn.resize(pixels, size=size, roi_start=start, roi_end=end, **_resizing(types, interpolation))
        return fn.pad(fn.flip(pixels, horizontal=flip), axes=(0, 1))

    return _built(graph, batch, device)


def require() -> tuple[Any, Any]:
    """DALI's ``fn`` and ``types``. Raises UserError where it is not installed."""
    try:
        from nvidia.dali import fn, types
    except ImportError as error:
        raise UserError(
            f"data.decoder=dali needs NVIDIA DALI ({error}); install it (in the checkout: pip install -e '.[dali]'), or set "
            "data.decoder=cpu"
        ) from error
    return fn, types


def release(device: torch.device) -> None:
    """Give the device memory of pipelines that are gone back to others."""
    if device.type == "cuda":
        import nvidia.dali.backend as backend

        backend.ReleaseUnusedMemory()  # type: ignore[attr-defined]


def fits(data: bytes) -> bool:
    """Whether DALI decodes this file on every device as the CPU decoder does, as far as its headers tell."""
    if data[:3] == b"\xff\xd8\xff":
        return b"\xff\xd9" in data[-_TAIL:] and _plain_jpeg(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        # 8 bits, gray or RGB, not interlaced; and with its last chunk.
        return (
            len(data) > 28
            and data[24:29] in (b"\x08\x00\0\0\0", b"\x08\x02\0\0\0")
            and b"IEND" in data[-_TAIL:]
        )
    return False


def _plain_jpeg(data: bytes) -> bool:
    """Baseline or progressive, 8 bits, gray or YCbCr (ITU-T T.81, B.2)."""
    at, end = 2, len(data) - 10
    adobe_rgb = False
    while at < end:
        if data[at] != 0xFF:
            return False
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if marker in (0xC0, 0xC1, 0xC2):
            components = data[at + 9]
            ids = data[at + 10 : at + 10 + 3 * components : 3]
            return data[at + 4] == 8 and (
                components == 1 or (components == 3 and not adobe_rgb and ids != b"RGB")
            )
        if 0xC3 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return False
        length = (data[at + 2] << 8) | data[at + 3]
        if marker == 0xEE and data[at + 4 : at + 9] == b"Adobe" and length >= 14:
            adobe_rgb = data[at + 15 : at + 16] == b"\0"
        at += 2 + length
    return False


@lru_cache(maxsize=1)
def placeholder() -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """A small JPEG that stands in the place of an image decoded elsewhere, and its size."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8), (16, 16)


def _decoding(types: Any, device: Device) -> dict[str, Any]:
    common = {"output_type": types.RGB, "adjust_orientation": False}
    if device.id is None:
        return {"device": "cpu", **common}
    return {
        "device": "mixed",
        "hw_decoder_load": device.hw_decoder_load,
        # DALI would tie each rank's threads to the same first cores.
        "affine": False,
        **_LARGEST,
        # As libjpeg-turbo upsamples, hence as the CPU decoder.
        "jpeg_fancy_upsampling": True,
        **common,
    }


def _resizing(types: Any, interpolation: str) -> dict[str, Any]:
    kind = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}[interpolation]
    return {"interp_type": kind, "antialias": True}


def _built(graph: Callable[[], Any], batch: int, device: Device) -> Any:
    import nvidia.dali.backend as backend
    from nvidia.dali import Pipeline

    if device.id is not None and device.preallocate:
        backend.PreallocateDeviceMemory(device.preallocate, device.id)  # type: ignore[attr-defined]
    pipeline = Pipeline(
        batch_size=batch,
        num_threads=device.threads,
        device_id=device.id,
        prefetch_queue_depth=device.depth,
        # Nothing in the graph is random; a seed that is set keeps DALI from drawing one.
        seed=0,
    )
    with pipeline:
        pipeline.set_outputs(graph())
    pipeline.build()
    return pipeline
