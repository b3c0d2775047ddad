"""The config of a surrogate: teacher, pool, student, training, and what is reported."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from jaxft import config as configs
from jaxft.config import Config
from jaxft.data.curvatures import Probes
from jaxft.recipe import KeysConfig, Strict
from jaxft.scratchrun import Shape

Range = tuple[float, float]
Vector = tuple[
    Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]
]

OURS = ("model", "head", "add_head", "output", "train", "train_size", "test", "e0s", "keys")
"""Keys of a fine-tuning config that the surrogate's own say."""


class Dynamics(Strict):
    """Molecular dynamics by the teacher; see :class:`jaxft.evaluate.mdruns.Plan`."""

    temperatures: list[float] = Field([300.0], min_length=1)
    """K."""
    ensemble: Literal["nve", "langevin", "bussi", "npt"] = "langevin"
    pressure: float = 0.0
    """GPa, of npt."""
    timestep: float = Field(1.0, gt=0)
    """fs."""
    steps: int = Field(1000, ge=1)
    interval: int = Field(20, ge=1)
    """Steps between frames of the pool."""
    starts: int | None = Field(None, ge=1)
    """Seed frames to start from, chosen at random; by default all."""
    replicas: int = Field(1, ge=1)
    """Of every start and temperature."""


class Rattle(Strict):
    """Random displacements, and compression and strain of cells; see :class:`Ranges
    <jaxft.evaluate.trials.Ranges>`. Frames that are not periodic in three directions keep their
    cells."""

    frames: int = Field(5, ge=1)
    """Of every seed frame."""
    amplitude: Range = (0.0, 0.15)
    """Å."""
    volume: Range = (0.9, 1.1)
    strain: float = Field(0.03, ge=0, lt=0.5)


class Keep(Strict):
    """Which structures stay in the pool."""

    max_force: float = Field(30.0, gt=0)
    """eV/Å, on any atom, by the teacher."""
    closest: float = Field(0.6, ge=0, lt=2)
    """Least distance of two atoms, in units of the sum of their covalent radii."""
    frames: int | None = Field(None, ge=2)
    """So many of what passes; by default all."""
    how: Literal["farthest", "random"] = "farthest"
    """Chosen: far from one another in the teacher's features, or at random."""


class Hessian(Strict):
    """The teacher's Hessian of every frame of the pool, times random displacements: what the term
    ``loss.hessian`` of ``training`` learns from."""

    probes: int = Field(2, ge=1)
    """Displacements of every frame."""
    kind: Probes = "gaussian"
    """``gaussian``: of all atoms at random; ``column``: of one coordinate of one atom; see
    :func:`jaxft.data.curvatures.displacements`."""


class Speed(Strict):
    """What is timed: a seed frame, repeated, alone and as a batch of replicas."""

    repeat: Vector = (1, 1, 1)
    """Supercell of the first seed frame; ignored where it is not periodic in three directions."""
    replicas: int = Field(8, ge=1)
    steps: int = Field(10, ge=1)
    """Of molecular dynamics, per turn."""
    turns: int = Field(5, ge=2)
    """Of each model, in alternation; medians are reported."""
    timestep: float = Field(0.5, gt=0)
    """fs."""


class SurrogateConfig(Strict):
    """A surrogate."""

    teacher: Path
    """Bundle."""
    head: str | None = None
    """Of the teacher; not needed with one head."""
    output: Path
    """Folder of the stages; what is there already and still right is used."""
    seeds: list[Path] | Path
    """Structures that the pool is made from; their labels are not looked at."""
    md: Dynamics | None = None
    rattle: Rattle | None = None
    keep: Keep = Keep()
    hessian: Hessian | None = None
    """Labels of second derivatives; by default none. Goes with a weight ``loss.hessian`` of
    ``training``."""
    student: Shape
    training: dict[str, Any]
    """Keys of a fine-tuning config (epochs, loss, optimizer, batch_size, valid, dtype …)."""
    test: dict[str, list[Path] | Path] = Field(default_factory=dict)
    """Frames with labels of the reference method, for the errors of both models."""
    keys: KeysConfig = KeysConfig()
    """Of the labels in ``test``."""
    speed: Speed | None = Speed()
    seed: int = Field(0, ge=0, lt=1 << 31)
    """Of the pool."""

    @field_validator("training")
    @classmethod
    def _is_left_to_training(cls, given: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(set(given) & set(OURS)):
            raise ValueError(
                f"{', '.join(taken)} follows from the surrogate's own keys; leave it out"
            )
        return given

    @model_validator(mode="after")
    def _fits_together(self) -> SurrogateConfig:
        if self.md is None and self.rattle is None:
            raise ValueError("give md, rattle or both: without them there is no pool")
        training = self.training_config(Path("student.jaxft"), Path("pool.xyz"), Path("run"))
        self._has_use_for_hessians(training)
        return self

    def _has_use_for_hessians(self, training: Config) -> None:
        weight = training.loss.hessian
        if self.hessian is not None and not weight:
            raise ValueError(
                f"hessian asks for {self.hessian.probes} displacements of every frame, but "
                "training.loss.hessian is 0 and nothing would be learnt from them; give that a "
                "weight, such as 1, or leave hessian out"
            )
        # sources of a replay may bring Hessians of their own
        if self.hessian is None and weight and not training.sources:
            raise ValueError(
                f"training.loss.hessian is {weight:g}, but the teacher labels no second "
                "derivatives; ask for some by `hessian: {probes: 2}` beside training, or leave "
                "the weight out"
            )

    def training_config(self, start: Path, pool: Path, output: Path) -> Config:
        """The training of the student, as a config of ``jaxft finetune``."""
        ours = {"model": str(start), "train": str(pool), "output": str(output), "e0s": "foundation"}
        return configs.validate({**self.training, **ours}, "training")


def load(path: Path, overrides: Iterable[str] = (), *, small: bool = False) -> SurrogateConfig:
    """Read a config of ``jaxft distill``.

    Args:
      path: YAML file; relative paths in it are relative to the working directory.
      overrides: ``key=value``, after those of ``small``.
      small: change what the file says under ``small``, a list of such words.

    Raises:
      ConfigError: as :func:`jaxft.config.load`, or the file has no small form.
    """
    hint = "configs/surrogate/nacl.yaml"
    document = configs.read_sized(path, overrides, small=small, hint=hint)
    return configs.checked(SurrogateConfig, document, str(path))
