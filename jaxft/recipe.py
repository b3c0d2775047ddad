"""Recipes in a config: one strict model per strategy, and how it becomes a strategy."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, model_validator

from jaxft import bundle, data, fisherfile
from jaxft.data import Frame, Keys
from jaxft.evaluate.descriptors import descriptors
from jaxft.potential import Potential, predict
from jaxft.strategies import STRATEGIES, Strategy
from jaxft.strategies.delta import support_of
from jaxft.typing import Params

Where = str | list[str]
Name = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^/]+$")]


class Strict(BaseModel):
    """Knows its keys, and refuses others."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class KeysConfig(Strict):
    """Names of the labels in the files."""

    energy: str = "REF_energy"
    forces: str = "REF_forces"
    stress: str = "REF_stress"
    virials: str = "REF_virials"
    hessian: str = "REF_hvp"
    probe: str = "probe"
    moments: str = "REF_magmoms"


@dataclass(frozen=True)
class Setting:
    """What a strategy may have to know of its run: the model that training starts from, after
    surgery, and the target's data."""

    model: Potential
    params: Params
    keys: Keys
    head: str | None = None
    train: Sequence[Frame] = ()
    seed: int = 0


class Entry(Strict):
    """A strategy in a config: its keys are arguments of the constructor."""

    strategy: str
    name: Name

    @property
    def inputs(self) -> list[Path]:
        """Files and bundles that it reads, beside frames."""
        return []

    def options(self, setting: Setting) -> dict[str, Any]:
        """The arguments that were given, files read."""
        return self.model_dump(exclude={"strategy"}, exclude_unset=True, exclude_none=True)

    def build(self, setting: Setting) -> Strategy:
        """The strategy; reads the files that it needs."""
        return STRATEGIES[self.strategy](**self.options(setting))

    def portable(self, leaves: list[str]) -> Entry:
        """What an adapter needs of it: no files. ``leaves`` are those that own coordinates."""
        return self


class Freeze(Entry):
    """See :func:`jaxft.strategies.freeze`."""

    strategy: Literal["freeze"]
    where: Where | None = None
    except_: Where | None = Field(None, alias="except")
    level: int | None = None
    name: Name = "freeze"


class Rate(Strict):
    """A factor of the learning rate that begins with an update."""

    start: int = Field(0, ge=0, alias="from")
    factor: float = Field(1.0, ge=0)

    def plain(self) -> dict[str, float]:
        return {"from": self.start, "factor": self.factor}


class Rates(Entry):
    """See :func:`jaxft.strategies.rates`."""

    strategy: Literal["rates"]
    factors: dict[str, float | Rate] = Field(min_length=1)
    name: Name = "rates"

    def options(self, setting: Setting) -> dict[str, Any]:
        factors = {
            pattern: value.plain() if isinstance(value, Rate) else value
            for pattern, value in self.factors.items()
        }
        return super().options(setting) | {"factors": factors}


class Lora(Entry):
    """See :func:`jaxft.strategies.lora`."""

    strategy: Literal["lora"]
    where: Where | None = None
    rank: int = Field(4, ge=1)
    alpha: float = 1.0
    scaling: Literal["torch", "classic", "rslora"] = "torch"
    init_std: float = Field(1.0, gt=0)
    also_train: Where | None = None
    name: Name = "lora"


class LoraTorch(Entry):
    """See :func:`jaxft.strategies.lora_torch`."""

    strategy: Literal["lora_torch"]
    rank: int = Field(4, ge=1)
    alpha: float = 1.0
    init: Literal["torch", "small"] = "torch"
    name: Name = "lora"


class Elora(Entry):
    """See :func:`jaxft.strategies.elora`."""

    strategy: Literal["elora"]
    rank: int = Field(16, ge=1)
    alpha: float = 16.0
    name: Name = "elora"


class Dora(Entry):
    """See :func:`jaxft.strategies.dora`."""

    strategy: Literal["dora"]
    where: Where | None = None
    rank: int = Field(4, ge=1)
    alpha: float = 1.0
    scaling: Literal["torch", "classic", "rslora"] = "torch"
    also_train: Where | None = None
    name: Name = "dora"


class Delta(Entry):
    """See :func:`jaxft.strategies.delta`."""

    strategy: Literal["delta"]
    where: Where = "**"
    support: Path | None = None
    """Bundle: only the numbers in which the model differs from it move."""
    name: Name = "delta"

    @property
    def inputs(self) -> list[Path]:
        return [] if self.support is None else [self.support]

    def options(self, setting: Setting) -> dict[str, Any]:
        options = super().options(setting)
        if self.support is not None:
            _, other, _ = bundle.load_numpy(self.support)
            options["support"] = support_of(other, setting.params)
        return options

    def portable(self, leaves: list[str]) -> Entry:
        return Delta(strategy="delta", where=leaves, name=self.name)


class Sparse(Entry):
    """See :func:`jaxft.strategies.sparse`."""

    strategy: Literal["sparse"]
    where: Where | None = None
    threshold: float = Field(1e-3, gt=0, lt=1)
    init_std: float = Field(0.01, gt=0)
    per: Literal["layer", "leaf"] = "layer"
    also_train: Where | None = None
    name: Name = "sparse"


class L2sp(Entry):
    """See :func:`jaxft.strategies.l2sp`."""

    strategy: Literal["l2sp"]
    strength: float = Field(ge=0)
    where: Where = "**"
    name: Name = "l2sp"


class Ewc(Entry):
    """See :func:`jaxft.strategies.ewc`."""

    strategy: Literal["ewc"]
    fisher: Path
    """Written by ``jaxft fisher`` or ``jaxft.fisher.save``."""
    strength: float = Field(ge=0)
    name: Name = "ewc"

    @property
    def inputs(self) -> list[Path]:
        return [self.fisher]

    def options(self, setting: Setting) -> dict[str, Any]:
        return super().options(setting) | {"fisher": fisherfile.load(self.fisher)}


class Distill(Entry):
    """See :func:`jaxft.strategies.distill`."""

    strategy: Literal["distill"]
    strength: float = Field(ge=0)
    energy: float = Field(1.0, ge=0)
    forces: float = Field(1.0, ge=0)
    stress: float = Field(0.0, ge=0)
    graphs: Literal["all", "unlabelled"] = "all"
    name: Name = "distill"

    def options(self, setting: Setting) -> dict[str, Any]:
        chosen = functools.partial(predict, setting.model)
        return super().options(setting) | {"predict": chosen}


class Selection(Strict):
    """Which frames of a file to take; see :func:`jaxft.data.select`."""

    n: int = Field(ge=1)
    how: Literal["random", "farthest"] = "random"
    """``farthest`` compares descriptors of the model that training starts from."""
    elements: Literal["none", "combinations", "inclusive", "exclusive"] = "none"
    """Which frames qualify, by the elements of the training frames."""


class Replay(Entry):
    """See :func:`jaxft.strategies.replay`."""

    strategy: Literal["replay", "multihead_replay", "pseudolabel_replay"]
    files: Path | list[Path]
    keys: KeysConfig | None = None
    """Names of the labels in these files; by default those of the run."""
    select: Selection | None = None
    watch: float = Field(0.1, ge=0, lt=1)
    """Fraction of the frames that is set aside, to be judged after every epoch."""
    head: str | None = None
    fraction: float = Field(0.5, ge=0, lt=1)
    schedule: Literal["mixed", "alternate"] = "mixed"
    batch_size: int | None = Field(None, ge=1)
    steps: int = Field(1, ge=1)
    weight: float = Field(1.0, ge=0)
    labels: Literal["given", "none"] = "given"
    """``none``: the frames are structures only, for ``distill``."""
    name: Name = "replay"

    @model_validator(mode="after")
    def _is_possible(self) -> Replay:
        if self.strategy == "pseudolabel_replay" and "labels" in self.model_fields_set:
            raise ValueError("pseudolabel_replay makes its own labels: remove `labels`")
        if self.name in ("train", "valid", "target"):
            raise ValueError(f"{self.name!r} is the name of a set of the run: choose another")
        if self.strategy == "multihead_replay" and self.head is None:
            raise ValueError("multihead_replay needs the head of its frames: set `head`")
        return self

    def options(self, setting: Setting) -> dict[str, Any]:
        return self._plain(setting) | {"frames": self.split(setting)[0]}

    def with_frames(self, setting: Setting, frames: Sequence[Frame]) -> Strategy:
        """The strategy with frames that were read already."""
        return STRATEGIES[self.strategy](**self._plain(setting), frames=frames)

    def _plain(self, setting: Setting) -> dict[str, Any]:
        options = super().options(setting)
        mine = {k: v for k, v in options.items() if k not in ("files", "keys", "select", "watch")}
        return mine | {"name": self.name}

    def split(self, setting: Setting) -> tuple[list[Frame], list[Frame]]:
        """Frames to train on, and frames to watch."""
        keys = setting.keys if self.keys is None else Keys(**self.keys.model_dump())
        frames = data.without_isolated_atoms(data.read(self.files, keys=keys))
        if self.select is not None:
            frames = self._selected(frames, setting)
        if not self.watch:
            return frames, []
        return data.split(frames, valid=self.watch, seed=setting.seed)

    def _selected(self, frames: list[Frame], setting: Setting) -> list[Frame]:
        chosen = self.select
        assert chosen is not None
        elements = {int(z) for frame in setting.train for z in frame.atomic_numbers}
        frames = data.filter_elements(frames, elements, rule=chosen.elements)
        if chosen.n > len(frames):
            raise ValueError(
                f"{self.name!r} selects {chosen.n} frames, but only {len(frames)} qualify;\n"
                "lower select.n, or remove `select` to take all frames."
            )
        found = None
        if chosen.how == "farthest":
            found = descriptors(setting.model, setting.params, frames, head=self.head)
        return data.select(frames, chosen.n, how=chosen.how, seed=setting.seed, descriptors=found)


StrategyConfig = Annotated[
    Union[  # noqa: UP007
        Freeze, Rates, Lora, LoraTorch, Elora, Dora, Delta, Sparse, L2sp, Ewc, Distill, Replay
    ],
    Field(discriminator="strategy"),
]
