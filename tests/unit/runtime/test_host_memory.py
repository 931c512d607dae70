import platform
import subprocess
import sys

COUNTED = """
import resource, torch
from dattrain.runtime.host_memory import keep_freed

kept = keep_freed()
for _ in range(8):  # the heap takes a few to be as large as it needs to be
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    sum(torch.ones(25_000_000) for _ in range(2))
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_a_tensor_of_the_next_update_takes_no_new_pages():
    """100 MB are 24,000 pages, which the kernel has to make each time where malloc is left as it is."""

    def pages(**environment):
        done = subprocess.run(
            [sys.executable, "-c", COUNTED], capture_output=True, text=True, check=True, env=environment
        )
        kept, count = done.stdout.split()
        return kept == "True", int(count)

    kept, count = pages()
    assert kept == (platform.libc_ver()[0] == "glibc")
    for name, value in (("MALLOC_ARENA_MAX", "1"), ("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")):
        tuned, before = pages(**{name: value})
        assert not tuned
        assert not kept or count < 1000 < before
