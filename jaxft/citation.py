"""Whom to cite: BibTeX of the works that a run rests on, and of no others."""

from __future__ import annotations

import difflib
import functools
import importlib.resources
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxft.strategies.base import Recipe
from jaxft.version import __version__

ALWAYS = ("jaxft", "batatia2022mace")
"""This package, and the model that it fine-tunes."""

BIBLIOGRAPHY = "citations.bib"

ACCENTS = {"'": "\u0301", "`": "\u0300", "^": "\u0302", '"': "\u0308", "~": "\u0303"}
"""TeX's accents as the combining characters that follow a letter."""


@dataclass(frozen=True)
class Work:
    """One entry of the bibliography; values as BibTeX has them."""

    key: str
    kind: str
    """``article``, ``inproceedings``, ``misc`` or ``software``."""
    fields: Mapping[str, str]

    @property
    def bibtex(self) -> str:
        lines = [f"  {name} = {{{value}}}," for name, value in self.fields.items()]
        return "\n".join([f"@{self.kind}{{{self.key},", *lines, "}"])

    @property
    def url(self) -> str:
        """Of the published version, else of the preprint; empty if there is neither."""
        if doi := self.fields.get("doi"):
            return f"https://doi.org/{doi}"
        if eprint := self.fields.get("eprint"):
            return f"https://arxiv.org/abs/{eprint}"
        return self.fields.get("url", "")

    @property
    def line(self) -> str:
        """Authors, title, place, year, address: one line of plain text."""
        where = self.fields.get("journal", self.fields.get("booktitle", ""))
        numbers = [self.fields[name] for name in ("volume", "pages") if name in self.fields]
        place = f". {where} {', '.join(numbers)}".rstrip() if where else ""
        text = f"{_authors(self.fields['author'])}: {self.fields['title']}{place}"
        return f"{plain(text)} ({self.fields['year']}). {self.url}".rstrip()


def citation(recipe: Recipe = (), *, also: Sequence[str] = ()) -> str:
    """BibTeX of jaxft, MACE, the methods of a recipe and whatever else was used, each once.

    Args:
      recipe: strategies; each names its works in ``cites``.
      also: keys of further works, e.g. of the optimiser or the foundation model.

    Returns:
      Entries in order of first mention, ending with a line feed.

    Raises:
      ValueError: a key is unknown; the message names close ones.

    Example:
      >>> from jaxft.strategies import l2sp
      >>> "2206.07697" in citation((l2sp(1.0),), also=["kingma2015adam"])
      True
    """
    return "\n\n".join(work.bibtex for work in works(recipe, also=also)) + "\n"


def works(recipe: Recipe = (), *, also: Sequence[str] = ()) -> tuple[Work, ...]:
    """The works themselves, as :func:`citation` orders them; ``line`` of each is plain text."""
    known = bibliography()
    named = [(key, f"strategy {s.name!r}") for s in recipe for key in s.cites]
    named += [(key, "also") for key in also]
    for key, by in named:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=3, cutoff=0.0)
            raise ValueError(
                f"{by} cites {key!r}, which is not in the bibliography of {len(known)} works;\n"
                f"closest: {', '.join(map(repr, close))}. Add a new work to {BIBLIOGRAPHY}."
            )
    return tuple(known[key] for key in dict.fromkeys([*ALWAYS, *(key for key, _ in named)]))


@functools.cache
def bibliography() -> Mapping[str, Work]:
    """All works that can be cited, by key."""
    text = importlib.resources.files("jaxft").joinpath(BIBLIOGRAPHY).read_text("utf-8")
    found = parse(text)
    own = found["jaxft"]
    found["jaxft"] = Work(own.key, own.kind, {**own.fields, "version": __version__})
    return found


def parse(text: str) -> dict[str, Work]:
    """Read a bibliography that has one field per line, as ours does.

    Raises:
      ValueError: a line is none of ``@kind{key,``, ``name = {value},``, ``}`` and a comment, braces
        do not match, or a key or a field is given twice.
    """
    found: dict[str, Work] = {}
    entry: Work | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("%"):
            continue
        start = re.fullmatch(r"@(\w+)\{(\w+),", line)
        pair = re.fullmatch(r"\s+(\w+) = \{(.*)\},", line)
        if start and entry is None and start[2] not in found:
            entry = Work(start[2], start[1], {})
        elif pair and entry and pair[1] not in entry.fields and _is_balanced(pair[2]):
            entry = Work(entry.key, entry.kind, {**entry.fields, pair[1]: pair[2]})
        elif line == "}" and entry:
            found[entry.key] = entry
            entry = None
        else:
            raise ValueError(
                f"line {number} of the bibliography cannot be read: {line[:60]!r};\n"
                "expected @kind{key, or a new '  name = {value},' with matching braces, or }."
            )
    if entry is not None:
        raise ValueError(
            f"the entry {entry.key!r} of the bibliography does not end; close it by }}."
        )
    return found


def _is_balanced(text: str) -> bool:
    depth = 0
    for character in text:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth < 0:
            return False
    return depth == 0


def plain(text: str) -> str:
    """TeX as plain text: accents composed, braces and double hyphens resolved."""

    def accented(match: re.Match[str]) -> str:
        return unicodedata.normalize("NFC", match[2] + ACCENTS[match[1]])

    text = re.sub(r"\{\\(['`^\"~])(\w)\}", accented, text)
    return text.replace("{", "").replace("}", "").replace("--", "–")


def _authors(text: str) -> str:
    """Family names; the first alone with "et al." beyond three."""
    names = text.split(" and ")
    families = [plain(name).split(",")[0] for name in names if name != "others"]
    if len(families) > 3 or "others" in names:
        return f"{families[0]} et al."
    return ", ".join(families)
