"""The config of a fine-tuning run: strict YAML, checked before anything is read or compiled."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args

import yaml
from ase.data import atomic_numbers
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from jaxft.fisher import load as load_fisher
from jaxft.strategies import STRATEGIES, Strategy

MAX_BYTES = 1 << 20
"""Of a config file."""


class ConfigError(ValueError):
    """A config that cannot be used; the message names the key."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str | Path) else value


class KeysConfig(_Strict):
    """Names of the labels in the files."""

    energy: str = "REF_energy"
    forces: str = "REF_forces"
    stress: str = "REF_stress"


class TestSet(_Strict):
    """A labelled set that is judged before and after."""

    __test__ = False
    files: list[Path] | Path
    e0s: Literal["model", "base"] = "model"
    """Isolated-atom energies of its level of theory: those of the fine-tuned model, or those that
    the base model came with."""


class _StrategyConfig(_Strict):
    def options(self) -> dict[str, Any]:
        """The arguments of the constructor that were given."""
        return self.model_dump(exclude={"strategy"}, exclude_unset=True)


class FreezeConfig(_StrategyConfig):
    """See :func:`jaxft.strategies.freeze`."""

    strategy: Literal["freeze"]
    where: str | list[str] | None = None
    except_: str | list[str] | None = Field(None, alias="except")
    name: str = "freeze"


class LoraConfig(_StrategyConfig):
    """See :func:`jaxft.strategies.lora`."""

    strategy: Literal["lora"]
    where: str | list[str] | None = None
    rank: int = 4
    alpha: float = 1.0
    also_train: str | list[str] | None = None
    name: str = "lora"


class L2spConfig(_StrategyConfig):
    """See :func:`jaxft.strategies.l2sp`."""

    strategy: Literal["l2sp"]
    strength: float = Field(ge=0)
    where: str | list[str] = "**"
    name: str = "l2sp"


class EwcConfig(_StrategyConfig):
    """See :func:`jaxft.strategies.ewc`."""

    strategy: Literal["ewc"]
    fisher: Path
    """From :func:`jaxft.fisher`, written by ``jaxft.fisher.save``."""
    strength: float = Field(ge=0)
    name: str = "ewc"

    def options(self) -> dict[str, Any]:
        return super().options() | {"fisher": load_fisher(self.fisher)}


StrategyConfig = Annotated[
    Union[FreezeConfig, LoraConfig, L2spConfig, EwcConfig],  # noqa: UP007
    Field(discriminator="strategy"),
]


class LossConfig(_Strict):
    """Weights of the mean squared errors; 0 leaves a term out and asks for no label."""

    energy: float = Field(1.0, ge=0)
    """(eV/atom)⁻²"""
    forces: float = Field(100.0, ge=0)
    """(eV/Å)⁻²"""
    stress: float = Field(0.0, ge=0)
    """(eV/Å³)⁻²"""

    @model_validator(mode="after")
    def _has_weight(self) -> LossConfig:
        if not (self.energy or self.forces or self.stress):
            raise ValueError("no weight is positive, so there is nothing to fit")
        return self


class OptimizerConfig(_Strict):
    """See :mod:`jaxft.optimizer`."""

    name: Literal["adam", "amsgrad", "adamw", "sgd"] = "adam"
    learning_rate: float = Field(1e-3, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = Field(0, ge=0)
    """Updates of linear rise."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled, towards zero; adamw only."""
    clip_norm: float | None = Field(10.0, gt=0)

    @model_validator(mode="after")
    def _decays(self) -> OptimizerConfig:
        if self.weight_decay and self.name != "adamw":
            raise ValueError(f"weight_decay was given for {self.name!r}, which has none; use adamw")
        return self


def _known_symbols(value: str | dict[str, float]) -> str | dict[str, float]:
    if isinstance(value, dict):
        unknown = [symbol for symbol in value if symbol not in atomic_numbers]
        if unknown:
            raise ValueError(f"{', '.join(map(repr, unknown))} is no chemical symbol")
    return value


class Config(_Strict):
    """A fine-tuning run."""

    model: Path
    """Bundle to start from."""
    head: str | None = None
    """Of the model, that all data belong to; not needed with one head."""
    output: Path
    """Folder of the run; made, must not exist."""
    train: list[Path] | Path
    """Labelled frames; those with config_type IsolatedAtom give E0s."""
    valid: float | list[Path] | Path = 0.1
    """Labelled frames, or the fraction of ``train`` to set aside."""
    test: dict[str, TestSet] = Field(default_factory=dict)
    keys: KeysConfig = KeysConfig()
    e0s: Annotated[
        Literal["foundation", "isolated_atoms", "estimated"] | dict[str, float],
        AfterValidator(_known_symbols),
    ]
    """Isolated-atom energies of the training data's level of theory: the model's own
    (``foundation``), those of IsolatedAtom frames in ``train``, the model's corrected by its errors
    on ``train`` (``estimated``), or {symbol: eV}."""
    recipe: list[StrategyConfig] = Field(default_factory=list)
    """Strategies; empty is full fine-tuning."""
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    epochs: int = Field(ge=1)
    batch_size: int = Field(8, ge=1)
    ema_decay: float | None = Field(0.999, ge=0, lt=1)
    patience: int | None = Field(None, ge=1)
    metric: Literal["loss", "energy", "forces", "stress"] = "loss"
    checkpoint_every: int | None = Field(None, ge=1)
    dtype: Literal["float32", "float64"] = "float32"
    seed: int = Field(0, ge=0, lt=1 << 32)

    @field_validator("output")
    @classmethod
    def _is_no_pattern(cls, path: Path) -> Path:
        # Orbax expands wildcards in the path of a checkpoint, and then cannot restore it.
        if any(character in str(path.absolute()) for character in "*?[]"):
            raise ValueError("the folder's full path must not contain any of * ? [ ]")
        return path

    @field_validator("test")
    @classmethod
    def _have_names(cls, sets: dict[str, TestSet]) -> dict[str, TestSet]:
        slugs = [slug(name) for name in sets]
        if "" in slugs or len(set(slugs)) != len(slugs):
            raise ValueError("names of test sets must differ in their ASCII letters and digits")
        return sets


def slug(name: str) -> str:
    """The part of a name that goes into a file name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a config.

    Args:
      path: YAML file; relative paths in it are relative to the working directory.
      overrides: ``key=value``, keys dotted (``optimizer.learning_rate=1e-4``), values YAML.

    Raises:
      ConfigError: the file is no YAML mapping, a key is unknown (the message names the closest
        one), or a value is not what is expected.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path} is not a file; `jaxft init --preset lora > {path}` writes one.")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{path} has {path.stat().st_size} bytes; a config is a small YAML file.")
    document = _parse(path.read_text(errors="replace"), str(path))
    if not isinstance(document, dict):
        raise ConfigError(
            f"{path} is no mapping of keys to values; see `jaxft init --preset lora`."
        )
    for override in overrides:
        _override(document, override)
    return validate(document, str(path))


def validate(document: dict[str, Any], source: str) -> Config:
    """A checked config from plain data; errors as :func:`load`."""
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise ConfigError(f"{source}:\n" + "\n".join(f"  {line}" for line in lines)) from error


def strategies(config: Config) -> tuple[Strategy, ...]:
    """The recipe that a config names; reads the files that strategies need."""
    return tuple(STRATEGIES[entry.strategy](**entry.options()) for entry in config.recipe)


def to_yaml(config: Config) -> str:
    """The resolved config, every default written out."""
    plain = config.model_dump(mode="json", by_alias=True)
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


class _Strictly(yaml.SafeLoader):
    """YAML without repeated keys, of which the last would win, and without anchors: a few bytes of
    nested aliases would expand without bound."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [getattr(key, "value", None) for key, _ in node.value]
        twice = {str(key) for key in keys if isinstance(key, str) and keys.count(key) > 1}
        if twice:
            raise yaml.YAMLError(f"the key {', '.join(sorted(twice))} occurs twice")
        return super().construct_mapping(node, deep=deep)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not supported in a config")
        return super().compose_node(parent, index)


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Strictly)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{source} is not YAML: {error}") from error


def _override(document: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"{override!r} is no override; write key=value.")
    *parents, name = key.split(".")
    node = document
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent!r} has no keys of its own.")
        node = child
    node[name] = _parse(value, f"the value of {key!r}")


def _explain(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] != "extra_forbidden":
        return f"{where}: {item['msg']} (given: {item.get('input')!r:.80})"
    known = _keys_at(item["loc"][:-1])
    name = str(item["loc"][-1])
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{where}: unknown key {name!r}{hint} (known: {', '.join(known)})"


def _keys_at(location: tuple[Any, ...]) -> list[str]:
    """The keys that a config knows at a place in it."""
    model: Any = Config
    for part in location:
        if isinstance(model, type) and issubclass(model, BaseModel):
            model = model.model_fields[part].annotation if part in model.model_fields else None
        for option in _models_of(model):
            if option.__name__.lower().startswith(str(part).lower()):
                model = option
    found = _models_of(model)
    return [f.alias or name for m in found[:1] for name, f in m.model_fields.items()]


def _models_of(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_of(part)]
