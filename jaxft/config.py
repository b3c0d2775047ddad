"""The config of a fine-tuning run: strict YAML, checked before anything is read or compiled."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from ase.data import atomic_numbers
from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from jaxft.data.curvatures import Probes
from jaxft.models.backend import Name as Backend
from jaxft.models.precision import Name as Precision
from jaxft.recipe import KeysConfig, Replay, Setting, StrategyConfig, Strict
from jaxft.strategies import Strategy

MAX_BYTES = 1 << 20
"""Of a config file."""


Model = TypeVar("Model", bound=BaseModel)


class ConfigError(ValueError):
    """A config that cannot be used; the message names the key."""


class TestSet(Strict):
    """A labelled set that is judged before and after."""

    __test__ = False
    files: list[Path] | Path
    head: str | None = None
    """By default that of the run."""
    e0s: Literal["model", "base"] = "model"
    """Isolated-atom energies of its level of theory: those of the fine-tuned model, or those that
    the base model came with."""


TERMS = ("energy", "forces", "stress", "virials", "hessian", "moments")


class LossConfig(Strict):
    """See :func:`jaxft.loss.weighted`; weight 0 leaves a term out and asks for no label."""

    error: Literal["mse", "mae", "huber", "universal", "l2"] = "mse"
    delta: float = Field(0.01, gt=0)
    """Where huber and universal turn from squares to absolute values; eV/atom, eV/Å, eV/Å³, µB."""
    energy: float = Field(1.0, ge=0)
    forces: float = Field(100.0, ge=0)
    stress: float = Field(0.0, ge=0)
    virials: float = Field(0.0, ge=0)
    hessian: float = Field(0.0, ge=0)
    """Of the Hessian times one displacement of each frame and epoch."""
    probe: Probes = "column"
    """Which: one of those that come with the frame, columns of its Hessian mostly, or a random sum
    of them."""
    moments: float = Field(0.0, ge=0)
    compare: Literal["magnitude", "sign", "direct"] = "magnitude"
    """Of moments: their magnitudes; or all of them, up to one sign per frame or as they are."""

    @property
    def terms(self) -> dict[str, float]:
        """λ of all terms."""
        return {name: getattr(self, name) for name in TERMS}

    @property
    def probes(self) -> Probes | None:
        """What batches are to carry; None where the Hessian has no weight."""
        return self.probe if self.hessian > 0 else None

    @property
    def weights(self) -> dict[str, float]:
        """λ of the terms that have any."""
        return {name: weight for name, weight in self.terms.items() if weight > 0}

    @property
    def labels(self) -> list[str]:
        """What frames must be labelled with."""
        return list(dict.fromkeys("stress" if n == "virials" else n for n in self.weights))

    @model_validator(mode="after")
    def _has_weight(self) -> LossConfig:
        if not self.weights:
            raise ValueError("no weight is positive, so there is nothing to fit")
        return self


class PlateauConfig(Strict):
    """Lower the learning rate when the metric no longer falls; see :mod:`jaxft.optimizer`."""

    factor: float = Field(0.8, gt=0, lt=1)
    patience: int = Field(50, ge=0)
    """Epochs."""
    min_factor: float = Field(0.0, ge=0, lt=1)


class OptimizerConfig(Strict):
    """See :mod:`jaxft.optimizer`."""

    name: Literal["sgd", "momentum", "adam", "amsgrad", "adamw", "schedule_free", "muon"] = "adam"
    learning_rate: float = Field(1e-3, ge=0)
    schedule: Literal["constant", "cosine", "linear", "exponential"] = "constant"
    warmup: int = Field(0, ge=0)
    """Updates of linear rise."""
    final: float = Field(0.01, gt=0, le=1)
    """Of the learning rate at the end of a schedule, as a fraction."""
    weight_decay: float | dict[str, float] = 0.0
    """Decoupled; of all that trains, or by pattern: {"coords/delta/**": 10.0}."""
    decay_towards: Literal["zero", "start"] = "zero"
    clip_norm: float | None = Field(10.0, gt=0)
    b1: float | None = Field(None, ge=0, lt=1)
    b2: float | None = Field(None, ge=0, lt=1)
    eps: float | None = Field(None, gt=0)
    alternation: Literal["separate", "project", "sum"] = "separate"
    """What updates of the target and of one alternating source know of each other: nothing; or what
    contradicts the other's gradient is removed; or the second of a pair has the sum of both."""
    plateau: PlateauConfig | None = None

    @field_validator("weight_decay")
    @classmethod
    def _is_decay(cls, value: float | dict[str, float]) -> float | dict[str, float]:
        rates = value.values() if isinstance(value, dict) else [value]
        if any(rate < 0 for rate in rates):
            raise ValueError("a weight decay is negative")
        return value


class AddHead(Strict):
    """A new head, called as ``head`` says, for the level of theory of the training data."""

    like: str | None = None
    """The head that it begins as; not needed with one."""


class AddMoments(Strict):
    """A new head for magnetic moments; see :func:`jaxft.surgery.add_moments`. It begins at each
    element's mean in the training labels."""

    kind: Literal["collinear", "signed", "vector"] = "collinear"
    energy: bool = False
    """Moments add to the energy."""
    hidden: int = Field(16, ge=1, le=1024)
    channels: int = Field(8, ge=1, le=1024)


class WandbConfig(Strict):
    """Weights & Biases; needs jaxft[wandb]."""

    project: str
    name: str | None = None
    mode: Literal["online", "offline"] = "online"


def known_symbols(value: str | dict[str, float]) -> str | dict[str, float]:
    """The value, if the keys of a mapping are chemical symbols; raises ValueError if not."""
    if isinstance(value, dict):
        unknown = [symbol for symbol in value if symbol not in atomic_numbers]
        if unknown:
            raise ValueError(f"{', '.join(map(repr, unknown))} is no chemical symbol")
    return value


class Config(Strict):
    """A fine-tuning run."""

    model: Path
    """Bundle to start from."""
    head: str | None = None
    """Of the model, that all data belong to; not needed with one head."""
    add_head: AddHead | None = None
    """Make ``head`` before training; needed for replay at another level of theory."""
    moments: AddMoments | None = None
    """Give the model a head for magnetic moments before training; one that it has already trains
    on without this."""
    output: Path
    """Folder of the run; made, must not exist."""
    train: list[Path] | Path
    """Labelled frames; those with config_type IsolatedAtom give E0s."""
    valid: float | list[Path] | Path = 0.1
    """Labelled frames, or the fraction of ``train`` to set aside."""
    train_size: int | None = Field(None, ge=1)
    """Train on so many of the frames only, chosen by ``seed`` after those of ``valid`` were set
    aside; a smaller selection is part of a larger one. Isolated atoms are not counted."""
    test: dict[str, TestSet] = Field(default_factory=dict)
    keys: KeysConfig = KeysConfig()
    config_types: dict[str, float] = Field(default_factory=dict)
    """Weights of training frames by their config_type."""
    e0s: Annotated[
        Literal["foundation", "isolated_atoms", "estimated", "average"] | dict[str, float],
        AfterValidator(known_symbols),
    ]
    """Isolated-atom energies of the training data's level of theory: the model's own
    (``foundation``), those of IsolatedAtom frames in ``train``, the model's corrected by its errors
    on ``train`` (``estimated``), a fit to total energies without the model (``average``: only to
    reproduce others' work), or {symbol: eV}."""
    recipe: list[StrategyConfig] = Field(default_factory=list)
    """Strategies; empty is full fine-tuning."""
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    epochs: int = Field(ge=1)
    max_seconds: float | None = Field(None, gt=0)
    """End with the epoch in which training and validation took so long in all; waiting for
    compilers is not counted."""
    batch_size: int = Field(8, ge=1)
    """Frames per batch, over all devices."""
    accumulate: int = Field(1, ge=1)
    """Batches per update."""
    ema_decay: float | None = Field(0.999, ge=0, lt=1)
    patience: int | None = Field(None, ge=1)
    metric: str = Field("loss", pattern=r"^([^/]+/)?(loss|energy|forces|stress|moments)$")
    """What chooses the best epoch: loss, energy, forces, stress or moments of the validation set,
    or, as in ``replay/forces``, of frames that a source sets aside."""
    checkpoint_every: int | None = Field(None, ge=1)
    keep_checkpoints: int = Field(1, ge=1)
    dtype: Literal["float32", "float64", "mixed"] = "float32"
    """``mixed``: parameters and optimiser in float64, the model in float32."""
    backend: Backend = "auto"
    """Who computes messages and contractions; ``auto`` is xla on every platform."""
    precision: Precision = "parity"
    """Of float32 matrix products in the loss: ``train`` and ``fast`` are less exact on GPUs and
    TPUs. Test sets are always judged with ``parity``."""
    cache: Path | None = None
    """Folder for neighbour lists."""
    workers: int | None = Field(None, ge=1)
    """Most processes to start for the neighbour lists of large sets, 1 being none; by default one
    for each core that the run may use."""
    tensorboard: bool = False
    wandb: WandbConfig | None = None
    seed: int = Field(0, ge=0, lt=1 << 32)

    @property
    def parameter_dtype(self) -> Literal["float32", "float64"]:
        return "float32" if self.dtype == "float32" else "float64"

    @property
    def compute_dtype(self) -> Literal["float32", "float64"]:
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def period(self) -> int:
        """Updates from one batch of the target to the next."""
        return 1 + sum(entry.steps for entry in self.sources if entry.schedule == "alternate")

    @property
    def sources(self) -> list[Replay]:
        """Entries that bring further data."""
        return [entry for entry in self.recipe if isinstance(entry, Replay)]

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if self.add_head is not None and self.head is None:
            raise ValueError("add_head needs a name for the new head: set `head`")
        if len({entry.name for entry in self.recipe}) < len(self.recipe):
            raise ValueError("two strategies of the recipe have one name: set `name` of one")
        if self.optimizer.name == "schedule_free" and self.ema_decay is not None:
            raise ValueError("schedule_free averages by itself: set `ema_decay: null`")
        alternates = any(entry.schedule == "alternate" for entry in self.sources)
        if self.optimizer.alternation != "separate" and not alternates:
            raise ValueError(
                f"alternation: {self.optimizer.alternation} needs a replay with "
                "`schedule: alternate`"
            )
        if self.accumulate > 1 and alternates:
            raise ValueError("accumulate does not go with a replay of `schedule: alternate`")
        return self

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
      overrides: see :func:`override`.

    Raises:
      ConfigError: the file is no YAML mapping, a key is unknown (the message names the closest
        one), or a value is not what is expected.
    """
    document = read_yaml(path, hint="`jaxft init --preset lora`")
    for word in overrides:
        override(document, word)
    return validate(document, str(path))


def validate(document: dict[str, Any], source: str) -> Config:
    """A checked config from plain data; errors as :func:`load`."""
    return checked(Config, document, source)


def read_yaml(path: str | Path, *, hint: str) -> dict[str, Any]:
    """The mapping in a small YAML file without tags, aliases and repeated keys.

    Args:
      path: of the file.
      hint: what shows how such a file looks.

    Raises:
      ConfigError: there is none.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path} is not a file; see {hint} for one.")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{path} has {path.stat().st_size} bytes; a config is a small YAML file.")
    document = _parse(path.read_text(errors="replace"), str(path))
    if not isinstance(document, dict):
        raise ConfigError(f"{path} is no mapping of keys to values; see {hint}.")
    return document


def read_sized(
    path: str | Path, overrides: Iterable[str], *, small: bool, hint: str
) -> dict[str, Any]:
    """As :func:`read_yaml`, of a file that may say under ``small`` how it becomes a small one.

    Args:
      path: of the file.
      overrides: ``key=value``, after those of ``small``.
      small: change what the file says under ``small``, a list of such words.
      hint: what shows how such a file looks.

    Raises:
      ConfigError: as there, or the file has no small form.
    """
    document = read_yaml(path, hint=hint)
    words = document.pop("small", None)
    if small and not (isinstance(words, list) and all(isinstance(w, str) for w in words)):
        raise ConfigError(f"{path} has no list `small:` of key=value; see {hint}.")
    for word in (*(words if small else ()), *overrides):
        override(document, word)
    return document


def override(document: dict[str, Any], word: str) -> None:
    """Change plain data in place.

    Args:
      document: a config, not yet checked.
      word: ``key=value``, keys dotted, entries of lists by their number
        (``optimizer.learning_rate=1e-4``, ``recipe.0.rank=8``), the value YAML.

    Raises:
      ConfigError: it is no such word, or leads through something that has no keys.
    """
    path, separator, value = word.partition("=")
    if not separator or not path:
        raise ConfigError(f"{word!r} is no override; write key=value.")
    *parents, last = path.split(".")
    node: Any = document
    for parent in parents:
        key = _key_in(node, parent, word)
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        node = node[key]
    node[_key_in(node, last, word)] = _parse(value, f"the value of {path!r}")


def checked(model: type[Model], document: dict[str, Any], source: str) -> Model:
    """Plain data as what ``model`` describes.

    Raises:
      ConfigError: a key is unknown (the message names the closest one), or a value is not what is
        expected.
    """
    try:
        return model.model_validate(document)
    except ValidationError as error:
        lines = [_explain(item, model) for item in error.errors()]
        raise ConfigError(f"{source}:\n" + "\n".join(f"  {line}" for line in lines)) from error


def strategies(config: Config, setting: Setting) -> tuple[Strategy, ...]:
    """The recipe that a config names; reads the files that strategies need."""
    return tuple(entry.build(setting) for entry in config.recipe)


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


def _key_in(node: Any, name: str, word: str) -> Any:
    """What ``name`` is in a mapping or a list.

    Raises:
      ConfigError: the node is neither, or has no entry of that number.
    """
    if isinstance(node, list):
        if not name.isdigit() or int(name) >= len(node):
            raise ConfigError(
                f"override {word!r}: {name!r} is no entry of a list of {len(node)}; they count "
                "from 0."
            )
        return int(name)
    if not isinstance(node, dict):
        raise ConfigError(f"override {word!r}: what holds {name!r} has no keys of its own.")
    return name


def _explain(item: Any, top: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if not where:
        return item["msg"].removeprefix("Value error, ")
    if item["type"] != "extra_forbidden":
        return f"{where}: {item['msg']} (given: {item.get('input')!r:.80})"
    known = _keys_at(item["loc"][:-1], top)
    name = str(item["loc"][-1])
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{where}: unknown key {name!r}{hint} (known: {', '.join(known)})"


def _keys_at(location: tuple[Any, ...], top: type[BaseModel]) -> list[str]:
    """The keys that a config knows at a place in it."""
    model: Any = top
    for part in location:
        if isinstance(model, type) and issubclass(model, BaseModel):
            by_key = {f.alias or n: f.annotation for n, f in model.model_fields.items()}
            model = by_key.get(str(part))
        tagged = [option for option in _models_of(model) if part in _tags(option)]
        model = tagged[0] if tagged else model
    found = _models_of(model)
    return [f.alias or name for m in found[:1] for name, f in m.model_fields.items()]


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    """What the key ``strategy`` of an entry of a recipe may say."""
    field = model.model_fields.get("strategy")
    return get_args(field.annotation) if field is not None else ()


def _models_of(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_of(part)]
