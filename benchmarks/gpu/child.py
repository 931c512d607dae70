"""The process of one stage: ``python -m benchmarks.gpu.child PLAN.json``."""

from __future__ import annotations

import json
import os
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.gpu.job import NOT_RUN, Job, NotRun


def main(plan: Path) -> int:
    """Run the stage of a plan. A missing package fails it by name."""
    given: dict[str, Any] = json.loads(plan.read_text(encoding="utf-8"))
    job = Job(**{**given, "folder": Path(given["folder"]), "lines": Path(given["lines"])})
    if job.dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        getattr(import_module(f"benchmarks.gpu.{job.module}"), job.function)(job)
    except NotRun as reason:
        print(reason, flush=True)
        return NOT_RUN
    except ModuleNotFoundError as error:
        traceback.print_exc()
        print(f"needs the package {error.name}, which is not installed here", flush=True)
        return 1
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        print(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    # Without Python's finalisation: gloo threads are known to abort in it, and what the stage found is written.
    os._exit(code)
