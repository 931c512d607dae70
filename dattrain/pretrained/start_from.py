"""What ``dattrain finetune`` starts from: a run, a checkpoint, a weights file of ours, or one that the authors released."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dattrain.config.choose import Weights
from dattrain.config.load import OWN_WEIGHTS
from dattrain.config.run import split_checkpoint
from dattrain.data.classes import canonical
from dattrain.errors import UserError
from dattrain.models.dat import DAT
from dattrain.models.zoo import VARIANTS
from dattrain.pretrained import import_authors, weights
from dattrain.pretrained.pretrained_cfg import PretrainedCfg, classes_of
from dattrain.state.format import named

RELEASED = "https://github.com/LeapLabTHU/DAT"
"""Where the authors publish their weights: the tables of its README."""


class Start:
    """Opened weights.

    Attributes:
        path: the run, checkpoint or file that ``init.from`` can name; None for a file of the authors, until ``write`` gives it one.
        cfg: what they are weights of.
        said: a line on where they are from.
    """

    def __init__(self, word: str) -> None:
        """Open what ``word`` names: a path, or the name of a run below ``runs``, either perhaps with ``@best`` or the like.

        Raises:
            UserError: nothing is there, or no weights of a DAT; says where the authors' are.
        """
        path, which = split_checkpoint(word)
        if not path.exists() and (Path("runs") / path).is_dir():
            path = Path("runs") / path
        if not path.exists():
            raise UserError(f"{word}: {_absent(word)}")
        if which is not None:
            path = named.find(f"{path}@{which}")
        if path.is_dir() and (path / "model.safetensors").is_file():
            path = path / "model.safetensors"
        self._model: DAT | None = None
        self.path: Path | None = None
        if path.is_file() and not _is_ours(path):
            try:
                self._model, self.cfg, origin = import_authors.read(path)
            except UserError as error:
                hint = f"`dattrain import {path} --config THEIRS.yaml` reads it with that, into a file that can be fine-tuned"
                raise UserError(
                    f"{path}: {error}; {hint}" if "configuration" in str(error) else str(error)
                ) from error
            self.said = f"{path}: {self.cfg.source}, architecture {origin}; every tensor survives the way to our names and back"
        else:
            self.path = path.absolute()
            _, self.cfg = weights.load_classifier(path, "`dattrain finetune`")
            self.said = f"{path}: {self.cfg.source or 'weights'}"
        if self.cfg.in_chans != 3:
            raise UserError(f"{path}: takes {self.cfg.in_chans} channels, and images have 3")

    def write(self, folder: Path) -> Path:
        """What ``init.from`` is to name; a file of the authors is written into ``folder`` in our names first."""
        if self._model is not None:
            self.path = (folder / OWN_WEIGHTS).absolute()
            weights.save(self.path, self._model.state_dict(), self.cfg, model=self._model)
        assert self.path is not None
        return self.path

    def weights(self, folder: Path, classes: Sequence[str]) -> Weights:
        """What ``config.choose`` is told; ``folder`` is where ``write`` would put them."""
        height, width = self.cfg.img_size
        return Weights(
            path=str(self.path or (folder / OWN_WEIGHTS).absolute()),
            name=self.cfg.name,
            img_size=height if height == width else (height, width),
            overrides=_plain(self.cfg),
            mean=self.cfg.mean,
            std=self.cfg.std,
            resize=self.cfg.resize,
            crop_pct=self.cfg.crop_pct,
            interpolation=self.cfg.interpolation,
            shared=len(set(map(canonical, classes)) & set(classes_of(self.cfg).names)),
        )


def _is_ours(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return weights.METADATA_KEY in (file.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        return False


def _plain(cfg: PretrainedCfg) -> dict[str, object]:
    """Overrides as a recipe holds them."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in (cfg.overrides or {}).items()
    }


def _absent(word: str) -> str:
    name = Path(word).name.lower()
    near = next((known for known in sorted(VARIANTS, key=len, reverse=True) if name.startswith(known)), None)
    hint = f"; no weights of {near} are shipped" if near else ""
    return (
        f"no such run, checkpoint or weights file (from {Path.cwd()}){hint}. The authors publish theirs at {RELEASED} (the tables "
        "of its README); download one and name the .pth file"
    )
