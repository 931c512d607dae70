import subprocess
import sys

import pytest

COUNTED = """
import resource, torch
from dattrain.runtime.malloc import keep_freed

kept = keep_freed()
counts = []
for _ in range(8):  # the heap takes a few to be as large as it needs to be
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    sum(torch.ones(25_000_000) for _ in range(2))
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, counts[-1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_a_tensor_of_the_next_update_takes_no_new_pages():
    """100 MB are 24,000 pages, which the kernel would have to make each time."""

    def pages(**environment):
        done = subprocess.run(
            [sys.executable, "-c", COUNTED], capture_output=True, text=True, check=True, env=environment
        )
        kept, count = done.stdout.split()
        return kept == "True", int(count)

    kept, count = pages()
    assert not kept or count < 1000
    assert not pages(MALLOC_ARENA_MAX="1")[0] and not pages(GLIBC_TUNABLES="glibc.malloc.arena_max=1")[0]
