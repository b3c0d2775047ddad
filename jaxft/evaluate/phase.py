r"""Displacive transitions: does a model leave the high-symmetry phase, and for which phase?

A crystal is relaxed under its own symmetry, its imaginary modes are found, the energy is followed
along each, and what lies at the bottom of the deepest wells is relaxed with all freedom. The space
group before and after names the transition.

With a transition predicted where the group after differs from the one before, right where it is
the expected one: :math:`P = \mathrm{right}/\mathrm{predicted}`,
:math:`R = \mathrm{right}/\mathrm{expected}` and :math:`F_1 = 2PR/(P+R)`. So a transition to a wrong
phase lowers both.

Reference: the phase walk of Grandel, Benner and George, arXiv:2604.01017.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ase

from jaxft.evaluate.candidate import Candidate, check_names
from jaxft.evaluate.finding import Finding, Line, Picture, Row, Value
from jaxft.evaluate.spacegroups import SpaceGroup, named_group, space_group
from jaxft.evaluate.walks import SHALLOW, Protocol, Walked, walked

ALL = "all structures"
"""The subject of precision and recall."""

UNITS = {
    "soft_modes": "",
    "lowest": "THz",
    "wave_vector": "",
    "depth": "meV/atom",
    "position": "Å",
    "gain": "meV/atom",
    "volume_change": "%",
    "before": "",
    "after": "",
    "expected": "",
    "is_right": "",
    "counted": "",
    "precision": "",
    "recall": "",
    "f1": "",
    "accuracy": "",
}

NOTES = (
    "Frequencies are negative where imaginary. depth and position: the minimum of the energy along "
    "the best mode, and the largest displacement of one atom there. gain: what the relaxed phase "
    "lies lower than the relaxed parent.",
    "Precision is of predicted transitions, recall of expected ones; right is the expected space "
    "group. Two structures of one space group count as one phase.",
)


def check(
    candidates: Sequence[Candidate],
    structures: Mapping[str, ase.Atoms],
    *,
    expected: Mapping[str, str | int | ase.Atoms] | None = None,
    against: str | None = None,
    protocol: Protocol | None = None,
) -> Finding:
    """Follow the imaginary modes of ``structures`` to the phases that they lead to.

    Args:
      candidates: the models.
      structures: high-symmetry phases by name, one cell each, periodic in three directions.
      expected: the phase that each ends in, as a space group (symbol or number) or a structure;
        that of the parent where it is stable.
      against: instead, the name of a candidate whose phases are the expected ones.
      protocol: see :class:`Protocol`.

    Returns:
      A row per model and structure, and one of precision, recall and F1 per model where anything
      is expected.

    Raises:
      ValueError: there are no candidates or structures, both ``expected`` and ``against`` are
        given, or either names what is not there.
      ImportError: phonopy is not installed.
    """
    check_names(candidates)
    protocol = protocol or Protocol()
    groups = _expected(candidates, structures, expected, against, protocol)
    found = {
        (c.name, name): walked(c, atoms, protocol)
        for c in candidates
        for name, atoms in structures.items()
    }
    if against is not None:
        ends = {name: found[against, name].after for name in structures}
        groups = {name: end for name, end in ends.items() if end is not None}
    rows: list[Row] = []
    for candidate in candidates:
        own = {name: found[candidate.name, name] for name in structures}
        rows += [_row(candidate.name, n, w, groups.get(n)) for n, w in own.items()]
        if groups and candidate.name != against:
            rows.append(Row(candidate.name, ALL, _scores(own, groups)))
    settings = {**vars(protocol), "shallow": SHALLOW, "against": against}
    pictures = tuple(p for name in structures if (p := _picture(name, candidates, found)))
    return Finding("phase", tuple(rows), UNITS, settings, pictures, NOTES)


def _expected(
    candidates: Sequence[Candidate],
    structures: Mapping[str, ase.Atoms],
    expected: Mapping[str, str | int | ase.Atoms] | None,
    against: str | None,
    protocol: Protocol,
) -> dict[str, SpaceGroup]:
    if not structures:
        raise ValueError("there is no structure to look at; give at least one.")
    if expected and against is not None:
        raise ValueError(
            "expected phases and a model to compare with were given; give one of them."
        )
    names = [candidate.name for candidate in candidates]
    if against is not None and against not in names:
        raise ValueError(f"the model {against!r} is none of {', '.join(map(repr, names))}.")
    unknown = sorted(set(expected or ()) - set(structures))
    if unknown:
        raise ValueError(
            f"phases of {', '.join(map(repr, unknown))} are expected, but the structures are "
            f"{', '.join(map(repr, structures))}; give each the name of its structure."
        )
    groups = {}
    for name, wanted in (expected or {}).items():
        if not isinstance(wanted, ase.Atoms):
            groups[name] = named_group(wanted)
        elif (group := space_group(wanted, protocol.symprec)) is not None:
            groups[name] = group
        else:
            raise ValueError(f"spglib finds no space group of the phase expected of {name!r}.")
    return groups


def _row(model: str, name: str, found: Walked, expected: SpaceGroup | None) -> Row:
    values = dict(found.values)
    for key, group in (("before", found.before), ("after", found.after), ("expected", expected)):
        if group is not None:
            values[key] = str(group)
    if expected is not None and found.after is not None:
        values["is_right"] = found.after == expected
    return Row(model, name, values, "; ".join(found.flags) or None)


def _scores(own: Mapping[str, Walked], expected: Mapping[str, SpaceGroup]) -> dict[str, Value]:
    counted = [
        (found.before, found.after, expected[name])
        for name, found in own.items()
        if name in expected and found.after is not None
    ]
    predicted = sum(after != before for before, after, _ in counted)
    wanted = sum(end != before for before, _, end in counted)
    right = sum(after == end != before for before, after, end in counted)
    return {
        "counted": len(counted),
        "precision": right / predicted if predicted else None,
        "recall": right / wanted if wanted else None,
        "f1": 2 * right / (predicted + wanted) if predicted + wanted else None,
        "accuracy": sum(after == end for _, after, end in counted) / len(counted)
        if counted
        else None,
    }


def _picture(
    name: str, candidates: Sequence[Candidate], found: Mapping[tuple[str, str], Walked]
) -> Picture | None:
    lines = tuple(
        Line(c.name, *line) for c in candidates if (line := found[c.name, name].line) is not None
    )
    if not lines:
        return None
    return Picture(
        f"{name}: along the best mode",
        "largest displacement of one atom, Å",
        "energy, meV/atom",
        lines,
    )
