"""What a config names, read and checked: everything that can be refused is refused here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import jax
from ase.data import atomic_numbers, chemical_symbols
from rich.console import Console
from rich.table import Table

from jaxft import bundle, data, surgery, tree
from jaxft import config as configs
from jaxft.adapter import digest_of
from jaxft.config import Config
from jaxft.data import Dataset, Frame, Keys, Mixture
from jaxft.describe import describe
from jaxft.evaluate.pseudolabel import pseudolabel, resolve
from jaxft.fit import check_metric
from jaxft.potential import Potential
from jaxft.preflight import Preflight, preflight
from jaxft.recipe import Replay, Setting
from jaxft.strategies import Recipe, Strategy, base
from jaxft.typing import Params


@dataclass(frozen=True, eq=False)
class Start:
    """The model that training starts from."""

    base: Potential
    """With all heads, and the E0s that it came with."""
    params: Params
    digest: str
    """:func:`jaxft.adapter.digest_of` the bundle, before surgery."""
    like: str | None = None
    """The head that the new one is a copy of."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """Everything that a run needs."""

    start: Start
    model: Potential
    """With the E0s of the training data."""
    recipe: Recipe
    train: Mixture
    valid: Dataset
    watch: Mapping[str, Dataset]
    tests: Mapping[str, Sequence[Frame]]
    preflight: Preflight | None
    """None if no training frame has an energy."""

    @property
    def params(self) -> Params:
        return self.start.params


def start(config: Config) -> Start:
    """The bundle that a config names, with the head that it adds.

    Raises:
      ValueError: the bundle cannot be read, or a head is unknown or exists already.
    """
    model, params = bundle.load(config.model, dtype=config.parameter_dtype)
    known = digest_of(model, params)
    if config.add_head is None:
        model.head_index(config.head)
        return Start(model, params, known)
    like = model.heads[model.head_index(config.add_head.like)]
    model, params = surgery.add_head(model, params, str(config.head), like=like)
    return Start(model, jax.tree.map(jax.numpy.asarray, params), known, like)


def with_moments(config: Config, begin: Start, train: Sequence[Frame] = ()) -> Start:
    """The same start, with the head for magnetic moments that the config asks for; it begins at the
    means of the training labels.

    Raises:
      ValueError: as :func:`jaxft.surgery.add_moments`; or the labels are of no use to the head.
    """
    if config.moments is None:
        return begin
    model, params = surgery.add_moments(
        begin.base,
        begin.params,
        means=data.mean_moments(train),
        seed=config.seed,
        **config.moments.model_dump(),
    )
    return replace(begin, base=model, params=params)


def computing(config: Config, begin: Start) -> Start:
    """The same start, with the backend that the config asks for.

    Raises:
      ValueError: the backend cannot be used here or for this model.
    """
    return replace(begin, base=begin.base.with_backend(config.backend))


def recipe(config: Config) -> tuple[Recipe, Params]:
    """The recipe of a config and the parameters that it acts on; reads data if strategies do."""
    begin = with_moments(config, start(config))
    frames: list[Frame] = []
    if any(isinstance(entry, Replay) and entry.select is not None for entry in config.recipe):
        frames = labelled_frames(config)[0]
    return configs.strategies(config, _setting(config, begin, begin.base, frames)), begin.params


def read(config: Config, console: Console) -> Inputs:
    """Read and check everything; prints what was found.

    Raises:
      ValueError: input that cannot be used.
    """
    begin = computing(config, start(config))
    names = keys(config)
    train, valid = labelled_frames(config)
    tests = {
        name: data.without_isolated_atoms(data.read(entry.files, keys=names))
        for name, entry in config.test.items()
    }
    fitted = [data.without_isolated_atoms(frames) for frames in (train, valid)]
    _check_labels(config, fitted[0], fitted[1])
    for frames in (*fitted, *tests.values()):
        data.check_elements(frames, begin.base.atomic_numbers)
    begin = with_moments(config, begin, fitted[0])
    for name, frames in tests.items():
        data.require_any_label(frames, keys=names)
        begin.base.head_index(_test_head(config, name))
    setting = _setting(config, begin, begin.base, fitted[0])
    strategies, watched = _recipe(config, setting)
    _check_moments(config, begin, strategies)
    _check_sources(config, setting, strategies)
    _check_metric(config, watched, names)
    console.print(describe(strategies, begin.params).splitlines()[-1], highlight=False)
    console.print(_coverage({"train": fitted[0], "valid": fitted[1], **watched, **tests}))
    check = _preflight(config, begin, train)  # the first to compile anything
    e0s = _e0s(config, train, valid, check)
    model = surgery.set_e0s(begin.base, e0s, head=config.head) if e0s else begin.base
    setting = replace(setting, model=model)
    sources = resolve(base.sources(strategies), model, begin.params, _own_head(config, model))
    mixture = data.mixture(
        fitted[0],
        model,
        head=config.head,
        sources=sources,
        size=config.batch_size,
        cache=config.cache,
        workers=config.workers,
        probes=config.loss.probes,
    )
    for line in mixture.describe():
        console.print(line, highlight=False)
    if check is not None:
        console.print(check.render())
    return Inputs(
        start=begin,
        model=model,
        recipe=strategies,
        train=mixture,
        valid=_prepared(config, fitted[1], model, config.head),
        watch=_watched(config, setting, watched),
        tests=tests,
        preflight=check,
    )


def test_model(config: Config, inputs: Inputs, name: str) -> tuple[Potential, str | None]:
    """The potential whose E0s suit a test set, and its head."""
    model = inputs.start.base if config.test[name].e0s == "base" else inputs.model
    return model, _test_head(config, name)


def _test_head(config: Config, name: str) -> str | None:
    return config.test[name].head or config.head


def keys(config: Config) -> Keys:
    """Names of the labels in the files."""
    return Keys(**config.keys.model_dump())


def _setting(config: Config, begin: Start, model: Potential, frames: Sequence[Frame]) -> Setting:
    return Setting(model, begin.params, keys(config), config.head, frames, config.seed)


def labelled_frames(config: Config) -> tuple[list[Frame], list[Frame]]:
    """Training and validation frames of a config, isolated atoms among them."""
    names = keys(config)
    train = data.weigh(data.read(config.train, keys=names), config_types=config.config_types)
    if isinstance(config.valid, float):
        train, valid = data.split(train, valid=config.valid, seed=config.seed)
    else:
        valid = data.read(config.valid, keys=names)
    if config.train_size is not None:
        train = data.subset(train, config.train_size, seed=config.seed)
    return train, valid


def _check_labels(config: Config, train: Sequence[Frame], valid: Sequence[Frame]) -> None:
    wanted, names = config.loss.labels, keys(config)
    judged_by = [] if config.metric.rpartition("/")[2] == "loss" else [config.metric]
    if not config.loss.hessian:
        data.require_labels(train, wanted, keys=names)
    # second derivatives are dear: frames to judge by energies and forces may do without
    wanted = [name for name in wanted if name != "hessian"] or wanted
    data.require_labels(valid, wanted + [name for name in judged_by if "/" not in name], keys=names)


def _check_moments(config: Config, begin: Start, strategies: Recipe) -> None:
    """A loss with moments needs a head for them, and a new head needs training."""
    if config.loss.moments and begin.base.moments is None:
        raise ValueError(
            "loss.moments is above 0, but the model has no head for magnetic moments;\nadd one: "
            "moments: {kind: collinear}."
        )
    if config.moments is None:
        return
    if not config.loss.moments:
        raise ValueError(
            "a head for magnetic moments is added, and nothing would train it: loss.moments is "
            "0;\ngive it a weight, such as 1."
        )
    trains = base.trains(strategies, begin.params)
    if not any(flag for path, flag in tree.flatten(trains).items() if path.startswith("moments/")):
        raise ValueError(
            "a head for magnetic moments is added, and the recipe freezes all of it;\ntrain it: "
            'also_train: "moments/**" of its strategy, or except: "moments/**" of freeze.'
        )


def _recipe(
    config: Config, setting: Setting
) -> tuple[tuple[Strategy, ...], dict[str, list[Frame]]]:
    """The strategies, and the frames that their sources set aside."""
    strategies, watched = [], {}
    for entry in config.recipe:
        if not isinstance(entry, Replay):
            strategies.append(entry.build(setting))
            continue
        frames, aside = entry.split(setting)
        strategies.append(entry.with_frames(setting, frames))
        if aside:
            watched[entry.name] = aside
    base.check_names(strategies)
    base.check(strategies, setting.params)
    return tuple(strategies), watched


def _own_head(config: Config, model: Potential) -> str:
    return model.heads[model.head_index(config.head)]


def _check_sources(config: Config, setting: Setting, strategies: Recipe) -> None:
    """Heads, elements, labels and levels of theory of what strategies bring."""
    own, wanted = _own_head(config, setting.model), config.loss.labels
    if config.loss.hessian:  # frames with second derivatives often have nothing else, and are few
        brought = [f for source in base.sources(strategies) for f in source.frames]
        data.require_labels([*setting.train, *brought], wanted, keys=setting.keys)
    for source in base.sources(strategies):
        setting.model.head_index(source.head or own)
        data.check_elements(source.frames, setting.model.atomic_numbers)
        if source.labels != "given":
            continue
        if not any(data.has_label(f, w) for f in source.frames for w in wanted):
            data.require_labels(source.frames, wanted, keys=setting.keys)
        has_energies = any(data.has_label(frame, "energy") for frame in source.frames)
        if has_energies and config.e0s != "foundation" and (source.head or own) == own:
            raise ValueError(
                f"{source.name!r} replays labels on head {own!r}, whose isolated-atom energies are "
                f"to be changed (e0s: {config.e0s}), so they would be of two levels of theory;\n"
                "use multihead_replay with add_head, pseudolabel_replay, or e0s: foundation."
            )


def _check_metric(config: Config, watched: Mapping[str, Sequence[Frame]], names: Keys) -> None:
    """The set that the metric is of must be watched, and labelled with what it measures."""
    check_metric(config.metric, watched)
    name, _, what = config.metric.rpartition("/")
    if not name:
        return
    entry = next(entry for entry in config.sources if entry.name == name)
    is_labelled = entry.strategy == "pseudolabel_replay"
    if not is_labelled:
        wanted = config.loss.labels if what == "loss" else [what]
        data.require_labels(watched[name], wanted, keys=names)


def _watched(
    config: Config, setting: Setting, watched: Mapping[str, list[Frame]]
) -> dict[str, Dataset]:
    found = {}
    for entry in config.sources:
        if entry.name not in watched or entry.labels == "none":
            continue
        frames, head = watched[entry.name], entry.head or config.head
        if entry.strategy == "pseudolabel_replay":
            frames = pseudolabel(setting.model, setting.params, frames, head=head)
        if any(data.has_label(f, name) for f in frames for name in ("energy", "forces")):
            found[entry.name] = _prepared(config, frames, setting.model, head)
    return found


def _prepared(
    config: Config, frames: Sequence[Frame], model: Potential, head: str | None
) -> Dataset:
    """What is judged: with what the loss reads."""
    return data.prepare(
        frames,
        model,
        head=head,
        cache=config.cache,
        workers=config.workers,
        probes=config.loss.probes,
    )


def _preflight(config: Config, begin: Start, train: Sequence[Frame]) -> Preflight | None:
    if not any(data.has_label(f, "energy") for f in data.without_isolated_atoms(train)):
        return None
    given = _given(config.e0s) if isinstance(config.e0s, dict) else None
    return preflight(begin.base, begin.params, train, head=config.head, given=given)


def _given(e0s: Mapping[str, float]) -> dict[int, float]:
    return {atomic_numbers[symbol]: value for symbol, value in e0s.items()}


def _e0s(
    config: Config,
    train: Sequence[Frame],
    valid: Sequence[Frame],
    check: Preflight | None,
) -> dict[int, float]:
    """The E0s that the config asks for; empty for those of the model."""
    if config.e0s == "foundation":
        return {}
    if config.e0s == "isolated_atoms":
        e0s = data.isolated_atom_energies(train)
        source = f"config_type={data.ISOLATED_ATOM} frames of the training files"
    elif isinstance(config.e0s, dict):
        e0s, source = _given(config.e0s), "the config"
    elif check is None:
        raise ValueError(
            f"e0s: {config.e0s} needs energies, and no training frame has one;\n"
            "give them as numbers, or use e0s: foundation."
        )
    else:
        e0s, source = check[config.e0s].e0s, "the fit to the training frames"
    needed = {int(z) for frame in (*train, *valid) for z in frame.atomic_numbers}
    missing = sorted(needed - set(e0s))
    if missing:
        raise ValueError(
            f"no isolated-atom energy for {', '.join(chemical_symbols[z] for z in missing)} in "
            f"{source};\ngive one per element of the training and validation frames, or "
            "e0s: foundation if they are of the model's own level of theory."
        )
    return e0s


def _coverage(sets: Mapping[str, Sequence[Frame]]) -> Table:
    table = Table(title="frames and labels", title_justify="left")
    table.add_column("set")
    covered = {name: data.coverage(frames) for name, frames in sets.items()}
    headings = ["frames", "energy", "forces", "stress"]
    headings += ["moments"] * any(found.moments for found in covered.values())
    for heading in headings:
        table.add_column(heading, justify="right")
    table.add_column("atoms by element")
    for name, found in covered.items():
        counts = (getattr(found, heading) for heading in headings)
        elements = " ".join(f"{symbol} {n}" for symbol, n in found.elements.items())
        table.add_row(name, *(str(count) for count in counts), elements)
    return table
