"""Stage ``kernels``: the Triton core against the fp64 equations on the device; bit for bit alike twice.

The cases are those that the tests run in Triton's interpreter, and the shapes of DAT's layers in every dtype.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, TimeoutError, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.gpu.job import Job

TESTS = Path(__file__).resolve().parents[2] / "tests" / "unit" / "ops"
sys.path.insert(0, str(TESTS))  # in every process of the pool, too


def run(job: Job) -> None:
    """Check every case; a case that fails is named and the rest go on.

    Nearly all of the time goes into compiling, so on a GPU as many processes as cores share it.
    """
    if job.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    found: list[Outcome] = []
    given = list(cases(job.dry))
    if job.dry:
        from run_triton_interpreted import multiply_bf16_as_numbers

        multiply_bf16_as_numbers()
        found = [tried(*case, job.device) for case in given]
    else:
        some = min(len(os.sched_getaffinity(0)), 16)
        pool = ProcessPoolExecutor(some, mp_context=get_context("spawn"))
        waiting = {pool.submit(tried, *case, job.device): case[0] for case in given}
        try:
            found = [done.result() for done in as_completed(waiting, timeout=max(job.left(), 0))]
        except TimeoutError:
            found = [done.result() for done in waiting if done.done()]
            print(f"no time for {', '.join(n for f, n in waiting.items() if not f.done())}", flush=True)
        pool.shutdown(wait=False, cancel_futures=True)
    wrong = [case.label for case in found if case.error]
    unequal = [case.label for case in found if case.same is False]
    for case in found:
        if case.error:
            print(f"{case.label}: {case.error}", flush=True)
    job.figure("cases", len(found), f"of {len(given)}")
    job.figure("cases run twice", sum(case.same is not None for case in found))
    job.figure("cases outside their bounds", len(wrong))
    job.figure("cases that differ between two runs", len(unequal))
    for title, names in (("outside their bounds", wrong), ("differ", unequal)):
        if names:
            job.figure(title, ", ".join(names)[:2000])


@dataclass(frozen=True)
class Outcome:
    """What became of a case; ``same`` is None where it was not run twice."""

    label: str
    error: str | None
    same: bool | None


def tried(name: str, case: Any, dtype: Any, strided: bool, device: str) -> Outcome:
    """Check one case, in whatever process."""
    from run_triton_interpreted import check

    label = f"{name} {dtype}{' strided' * strided}"
    try:
        check(name, case, dtype, strided, device)
        return Outcome(label, None, same_twice(case, dtype, device) if case.batch else None)
    except Exception as error:
        return Outcome(label, f"{type(error).__name__}: {error}", None)


def cases(dry: bool) -> Iterator[tuple[str, Any, Any, bool]]:
    """(name, case, dtype, whether strided): the tests' own in each dtype, then layers' sizes, both grids, dims, strides."""
    import torch
    from run_triton_interpreted import CASES as known

    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    if dry:
        yield "one row", known["one row"], torch.float32, True
        yield "center", known["center"], torch.bfloat16, False
        return
    for name, case in known.items():
        for dtype in dtypes:
            yield name, case, dtype, False
    # Large maps meet whole indices, where slopes jump; there fp32 and fp64 may well differ.
    base = replace(known["center"], batch=2, heads=4, groups=2, dim=32, smooth=True)
    for side in (7, 12, 14, 24):
        for grid in ("center", "corner"):
            case = replace(
                base, height=side, width=side, keys=side * side, table=(2 * side - 1, 2 * side - 1), grid=grid
            )
            for dtype in dtypes:
                for strided in (False, True):
                    yield f"{side}x{side} {grid}", case, dtype, strided
    square = replace(base, height=14, width=14, keys=196, table=(27, 27))
    for dim in (16, 64, 96, 128):
        for dtype in dtypes:
            yield f"14x14 d={dim}", replace(square, dim=dim), dtype, False
    for side, keys in ((56, 49), (28, 49)):
        case = replace(
            base,
            batch=1,
            height=side,
            width=side,
            keys=keys,
            table=(2 * side - 1, 2 * side - 1),
            grid="corner",
        )
        for dtype in dtypes:
            yield f"{side}x{side}, {keys} keys", case, dtype, False


def same_twice(case: Any, dtype: Any, device: str) -> bool:
    """Whether output and gradients of two runs have the same bits."""
    import torch

    from dattrain import ops

    runs = []
    for _ in range(2):
        inputs: list[Any] = [
            None if x is None else x.detach().to(device).requires_grad_() for x in case.inputs(dtype)
        ]
        out = ops.deform_attention(*inputs, **case.keywords, backend="triton")
        wanted = [x for x in inputs if x is not None]
        gradients = torch.autograd.grad(out.float().square().sum(), wanted, allow_unused=True)
        runs.append([out, *(g for g in gradients if g is not None)])
    return all(torch.equal(a, b) for a, b in zip(*runs))
