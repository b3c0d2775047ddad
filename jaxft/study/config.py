"""The config of a study: what is compared, and how much each may cost."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, field_validator, model_validator

from jaxft import config as configs
from jaxft import presets
from jaxft.recipe import StrategyConfig, Strict

Files = list[Path] | Path
Words = list[str]
"""``key=value`` as on the command line of ``jaxft finetune``."""


def _name(text: str) -> str:
    if not text.strip() or any(c in text for c in "/\\=,\n"):
        raise ValueError(f"{text!r} is no name: empty, or with one of / \\ = ,")
    return text


Name = Annotated[str, AfterValidator(_name)]

Axis = list[Any] | dict[Name, Words]
"""Values of the key that it is called after, or several keys at once: ``{label: [key=value]}``."""


class PhononsConfig(Strict):
    """A crystal whose phonons are compared with a reference, before and after."""

    crystal: Path
    """As of ``jaxft evaluate phonons``: a folder of phonopy with its reference, or a structure."""
    supercell: tuple[int, int, int] | None = None
    """Repetitions, where no file says them."""
    reference: Path | None = None
    """A bundle whose phonons are the reference, in place of the crystal's own."""
    head: str | None = None
    """Of ``reference``."""
    mesh: float = Field(40.0, gt=0)
    """Of q points, phonopy's measure, Å."""


class DatasetConfig(Strict):
    """Frames of one target."""

    train: Files
    valid: float | Files = 0.1
    test: dict[Name, Files] = Field(default_factory=dict)
    """Judged before and after, at the level of theory of ``train``."""
    phonons: dict[Name, PhononsConfig] = Field(default_factory=dict)
    set: Words = Field(default_factory=list)


class FisherConfig(Strict):
    """A Fisher that entries of recipes name; options as of ``jaxft fisher``."""

    files: Files
    """Frames of the pretraining data."""
    n: int | None = Field(None, ge=1)
    probes: int | None = Field(None, ge=1)
    """Per frame, of a sampled Fisher; without them it is the empirical one."""
    threshold: float | None = None
    normalise: Literal["mean", "max"] | None = None
    head: str | None = None
    seed: int = 0


class RecipeConfig(Strict):
    """What is done to the model: a preset, or strategies as in a config of ``jaxft finetune``."""

    preset: str | None = None
    recipe: list[StrategyConfig] | None = None
    base: Path | None = None
    """Bundle to start from instead of that of the study."""
    scratch: bool = False
    """Start from random parameters instead, of the architecture of the base: drawn from the seed,
    with E0s, scale, shift and neighbours of the cell's training frames. Nothing is forgotten, so
    ``base_test`` is left out."""
    set: Words = Field(default_factory=list)
    vary: dict[str, Axis] = Field(default_factory=dict)
    """Hyperparameters of this recipe alone; replaces an axis of the study with the same name."""

    @model_validator(mode="after")
    def _is_one(self) -> RecipeConfig:
        if (self.preset is None) == (self.recipe is None):
            raise ValueError("give either `preset` or `recipe` ([] is full fine-tuning)")
        if self.scratch and self.base is not None:
            raise ValueError("give either `base` or `scratch`, random parameters of the study's")
        if self.preset is not None:
            presets.text(self.preset)
        return self


class BudgetConfig(Strict):
    """What every cell may spend; one of the three."""

    epochs: int | None = Field(None, ge=1)
    steps: int | None = Field(None, ge=1)
    """Updates; rounded to whole epochs, at least one."""
    seconds: float | None = Field(None, gt=0)
    """Of training and validation, without compilation; needs a constant learning rate."""

    @model_validator(mode="after")
    def _is_one(self) -> BudgetConfig:
        given = [self.epochs, self.steps, self.seconds]
        if sum(value is not None for value in given) != 1:
            raise ValueError("give one of epochs, steps, seconds")
        return self


class Common(Strict):
    """What studies and searches have in common."""

    output: Path
    """Folder of the study."""
    base: Path
    """Bundle that all recipes start from; a torch ``.model`` is converted into ``output`` first."""
    datasets: dict[Name, DatasetConfig] = Field(min_length=1)
    base_test: dict[Name, Files] = Field(default_factory=dict)
    """Frames of the base model's own level of theory: what of it is forgotten. Judged with the
    base's isolated-atom energies, and on the base's head where a recipe adds one."""
    fishers: dict[Name, FisherConfig] = Field(default_factory=dict)
    """By the name that ``ewc`` entries give as their ``fisher``; estimated when first needed, at
    the model and with the loss of the cell."""
    set: Words = Field(default_factory=list)
    """Of all cells; datasets, recipes, axes and budget override it, in this order."""
    budget: BudgetConfig | None = None
    """Without one each cell has the epochs of its preset."""

    @field_validator("output")
    @classmethod
    def _is_no_pattern(cls, path: Path) -> Path:
        if any(character in str(path.absolute()) for character in "*?[]"):
            raise ValueError("the folder's full path must not contain any of * ? [ ]")
        return path

    @model_validator(mode="after")
    def _have_names_of_their_own(self) -> Common:
        for name, dataset in self.datasets.items():
            slugs = [configs.slug(test) for test in (*dataset.test, *self.base_test)]
            if "" in slugs or len(set(slugs)) < len(slugs):
                raise ValueError(
                    f"test sets of {name!r} and of the base must differ in their ASCII letters and "
                    "digits"
                )
        return self


class StudyConfig(Common):
    """Datasets × recipes × hyperparameters × training-set sizes × seeds."""

    recipes: dict[Name, RecipeConfig] = Field(min_length=1)
    vary: dict[str, Axis] = Field(default_factory=dict)
    """Hyperparameters that all recipes go through: ``optimizer.learning_rate: [1e-3, 1e-2]``, or
    ``e0s: {good: [e0s=estimated], bad: [e0s=average]}``."""
    sizes: list[Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)]] | None = None
    """Of the training set, validation frames set aside: numbers of frames, or fractions."""
    seeds: int | list[int] = 1
    """How many, from 0, or which."""

    @field_validator("seeds")
    @classmethod
    def _are_different(cls, seeds: int | list[int]) -> int | list[int]:
        every = range(seeds) if isinstance(seeds, int) else seeds
        if not len(every) or len(set(every)) < len(every) or min(every) < 0:
            raise ValueError("give a number of seeds >= 1, or a list of different ones >= 0")
        return seeds

    @model_validator(mode="after")
    def _axes_have_values(self) -> StudyConfig:
        for where in (self.vary, *(recipe.vary for recipe in self.recipes.values())):
            check_axes(where)
        return self

    @property
    def all_seeds(self) -> list[int]:
        return list(range(self.seeds)) if isinstance(self.seeds, int) else list(self.seeds)


def check_axes(axes: dict[str, Axis]) -> None:
    """Raises ValueError if an axis has no values."""
    for name, axis in axes.items():
        if not axis:
            raise ValueError(f"the axis {name!r} has no values")


Study = TypeVar("Study", bound=Common)


def load(
    path: Path, overrides: Iterable[str] = (), *, small: bool = False, kind: type[Study]
) -> Study:
    """Read a study or a search.

    Args:
      path: YAML; relative paths in it are relative to the working directory.
      overrides: ``key=value``, as :func:`jaxft.config.override`; after those of ``small``.
      small: change what the file says under ``small``, a list of such words.
      kind: what the file describes.

    Raises:
      ConfigError: as :func:`jaxft.config.load`, or the file has no small form.
    """
    document = configs.read_sized(path, overrides, small=small, hint="docs/study.md")
    return configs.checked(kind, document, str(path))
