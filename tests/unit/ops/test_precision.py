"""Torch's TF32 switches, old and new: each is process-wide and some cannot be taken back, so each is set in a child."""

import sys

import warm

SETTINGS = {
    "": "ieee",
    "torch.backends.fp32_precision = 'tf32'": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'": "ieee",
    "torch.backends.cudnn.conv.fp32_precision = 'tf32'": "ieee",
    "torch.backends.cuda.matmul.allow_tf32 = True": "tf32",
    "torch.backends.cuda.matmul.allow_tf32 = False": "ieee",
    "torch.set_float32_matmul_precision('high')": "tf32",
    "torch.set_float32_matmul_precision('highest')": "ieee",
    # A caller's settings do not outlive ours.
    "torch.backends.fp32_precision = 'tf32'; configure(); assert not torch.backends.cudnn.allow_tf32": "ieee",
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'; configure(tf32=True)": "tf32",
}
CODE = """
import os
import torch
from dattrain.ops.precision import products_of
from dattrain.runtime.environment import configure

for setting, expected in {settings!r}.items():
    child = os.fork()
    if child == 0:
        exec(setting)
        found = [products_of(torch.empty(1, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
        good = found == [expected, "ieee", "ieee"]
        print("" if good else f"{{setting}}: {{found}}", end="", flush=True)
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0, setting
"""


def test_every_way_of_allowing_tf32_is_seen_and_none_raises():
    command = [sys.executable, "-c", CODE.format(settings=SETTINGS)]
    done = warm.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
