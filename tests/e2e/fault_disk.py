"""One process that saves a small state at every step: ``python fault_disk.py RUN OUT``; OUT gets a checksum of the end."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "dist"))

from state_ranks import free_port

from dattrain.errors import UserError
from dattrain.state import gather
from dattrain.state.format import checkpoint


def main() -> None:
    """Train; on a UserError print it and exit with its code, as the command line does."""
    import os

    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
    )
    from state_worker import Job, finish, run, start_distributed

    start_distributed()
    run_dir, out = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        run(
            Job(
                str(run_dir),
                str(out),
                2,
                width=64,
                ema=0.9,
                resume=True,
                until=6,
                save_at=list(range(1, 6)),
                keep_last=100,
            )
        )
    except UserError as e:
        print(e, file=sys.stderr, flush=True)
        finish(e.exit_code)
    folder = checkpoint.locate(run_dir)
    digest = hashlib.sha256()
    for state in checkpoint.check(folder).states:
        for name, tensor in gather.iter_tensors(folder, state):
            digest.update(name.encode() + tensor.numpy().tobytes())
    out.write_text(json.dumps([folder.name, digest.hexdigest()]))
    finish(0)


if __name__ == "__main__":
    main()
