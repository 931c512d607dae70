"""One rank of test_import_deepspeed: the state of one of our checkpoints, saved by DeepSpeed."""

import os
import sys
from pathlib import Path

from dattrain.config.derive import derive
from dattrain.config.load import load
from dattrain.engine.session import open_session
from dattrain.runtime import environment
from dattrain.state import load as loading
from dattrain.state.format.checkpoint import check
from dattrain.state.partition import LocalState


def main(run: Path, checkpoint: Path, folder: Path) -> None:
    """Read ``checkpoint`` into an engine of the run's recipe, and let DeepSpeed save it in ``folder``."""
    env = environment.resolve(os.environ)
    device = environment.pick_device(env)
    environment.connect(env, device, 120)
    config = load(run / "config.yaml").config
    session = open_session(
        config, derive(config, world=env.world, samples_per_epoch=96), device, config.model.img_size
    )
    local = LocalState(session.engine)
    loading.load(local, checkpoint, check(checkpoint))
    local.refresh()
    session.engine.save_checkpoint(str(folder))
    environment.disconnect()
    environment.hard_exit(0)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
