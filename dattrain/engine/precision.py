"""What follows from ``train.precision``, and the sizes of DeepSpeed's buckets: for the engine, and for the plan of its memory."""

from __future__ import annotations

import torch

WEIGHTS = {"fp32": torch.float32, "bf16": torch.float32, "bf16-pure": torch.bfloat16, "fp16": torch.float16}
"""Dtype of weights and of the network's input by ``train.precision``; under autocast (``bf16``) the layers cast by themselves."""
COMPUTE = {**WEIGHTS, "bf16": torch.bfloat16}
"""Dtype of its matrix products."""
GRADIENTS = {"fp32": torch.float32, "bf16": torch.float32, "bf16-pure": torch.float32, "fp16": torch.float16}
"""Dtype in which gradients are accumulated over the micro-batches of an update, under ZeRO stages 1 to 3."""

REDUCE_BUCKET = 5_000_000
"""Elements of a reduction bucket. A bucket travels beside the rest of backward, so there must be several: DAT-T (28.3 M) has 6 and
DAT-B (87.9 M) 18; what is reduced after backward is at most one, 20 MB in fp32. Of 50 M, DAT-T was one bucket and DAT-B two, so
little or nothing overlapped. Not smaller, since DAT-B's largest matrix (4096 x 1024, 4.2 M) shall fit: a larger one (a head
of 21,841 classes) is reduced by itself."""
ALLGATHER_BUCKET = 200_000_000
"""Most elements that stages 1 and 2 gather at once after a step."""
PREFETCH_BUCKET = 50_000_000
"""Most elements that stage 3 gathers ahead of their use."""
STAGE_0_BUCKET = 500_000_000
"""Most elements of the flat copy through which stage 0 reduces gradients: DeepSpeed's own, which no setting changes."""
