"""Chains: stages that follow one another (pre-train, fine-tune, evaluate), each from the run folder of the one before.

A chain is a YAML file::

    name: in22k_to_in1k_384
    stages:
      pretrain: {config: in22k_dat_base_224, nodes: 4}
      finetune: {config: in1k_dat_base_384_from_22k, from: pretrain}
      evaluate: {evaluate: finetune, nodes: 1}

Recipes are files, relative to the chain's, or names of shipped ones. All stages are submitted at once, each behind the success of the one that it
starts from. Pure but for reading files; ``dattrain.submit.submission`` submits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dattrain.config import shipped
from dattrain.config.explain import explain
from dattrain.config.load import Loaded, load
from dattrain.errors import ConfigError


class ChainStage(BaseModel):
    """One stage: a recipe to train, or the evaluation of another stage. What is left out comes from the command line."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    config: str | None = None
    """Recipe: a file, relative to the chain's, or the name of a shipped one."""
    evaluate: str | None = None
    """Stage whose run is evaluated; instead of ``config``."""
    from_: Annotated[str | None, Field(alias="from")] = None
    """Stage whose weights this one starts from (``init.from``)."""
    overrides: tuple[str, ...] = ()
    """``section.key=value``, as on the command line."""
    nodes: Annotated[str | None, Field(coerce_numbers_to_str=True)] = None
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    time: str | None = None
    retries: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _one_purpose(self) -> ChainStage:
        if (self.config is None) == (self.evaluate is None):
            raise ValueError("a stage has either a config to train or a stage to evaluate")
        if self.evaluate is not None and self.from_ is not None:
            raise ValueError("an evaluation takes the weights of the stage that it evaluates; leave from out")
        return self

    @property
    def needs(self) -> str | None:
        """The stage that has to end well before this one."""
        return self.evaluate or self.from_

    @property
    def size(self) -> dict[str, Any]:
        """The stage's own size, where it has one: ``nodes``, ``gpus_per_node``, ``time``, ``retries``."""
        own = {key: getattr(self, key) for key in ("nodes", "gpus_per_node", "time", "retries")}
        return {key: value for key, value in own.items() if value is not None}


class Chain(BaseModel):
    """A named sequence of stages."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    description: str = ""
    stages: Annotated[dict[str, ChainStage], Field(min_length=1)]

    @model_validator(mode="after")
    def _order(self) -> Chain:
        seen: set[str] = set()
        for name, stage in self.stages.items():
            if "/" in name or "." in name:
                raise ValueError(
                    f"stage {name!r}: a name is used as a folder and before the dot of key=value"
                )
            if stage.needs is not None and stage.needs not in seen:
                known = ", ".join(seen) or "none"
                raise ValueError(
                    f"stage {name} needs {stage.needs!r}, which does not come before it (before it: {known})"
                )
            seen.add(name)
        return self


@dataclass(frozen=True)
class ResolvedStage:
    """A stage with its run folder and its resolved recipe."""

    name: str
    stage: ChainStage
    run: Path
    loaded: Loaded


def is_chain(path: Path) -> bool:
    """Whether a file is a chain: it has stages."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return False
    return isinstance(raw, dict) and "stages" in raw


def read(path: Path) -> Chain:
    """Read and check a chain.

    Raises:
        ConfigError: naming the file and the key.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Chain.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(explain(error, Chain, str(path))) from None


def resolve(chain: Chain, path: Path, root: Path, overrides: Sequence[str] = ()) -> list[ResolvedStage]:
    """Stages in order, with run folders ``root/STAGE`` and recipes that start from the run folder of the stage before.

    Args:
        chain: as ``read`` from ``path``.
        overrides: ``stage.section.key=value``.

    Raises:
        ConfigError: a recipe is wrong, or an override names no stage.
    """
    given: dict[str, list[str]] = {name: list(stage.overrides) for name, stage in chain.stages.items()}
    for override in overrides:
        name, dot, rest = override.partition(".")
        if not dot or name not in given:
            raise ConfigError(
                f"command line: {override!r}: in a chain write stage.section.key=value; stages: {', '.join(given)}"
            )
        given[name].append(rest)
    resolved: dict[str, ResolvedStage] = {}
    for name, stage in chain.stages.items():
        if stage.evaluate is not None:
            source = resolved[stage.evaluate]
            if source.stage.config is None:
                raise ConfigError(
                    f"{path}: stages.{name}: evaluate names {stage.evaluate}, which trains nothing"
                )
            recipe, extra = source.stage.config, given[stage.evaluate]
        else:
            assert stage.config is not None
            recipe, extra = stage.config, []
        origin = [f"init.from={root / stage.needs}"] if stage.needs else []
        beside = path.parent / recipe
        path_of = beside if beside.is_file() else shipped.named(recipe) or beside
        try:
            loaded = load(path_of, [*extra, *given[name], *origin])
        except ConfigError as error:
            raise ConfigError(f"{chain.name}.{name}: {error}") from None
        resolved[name] = ResolvedStage(name, stage, root / name, loaded)
    return list(resolved.values())
