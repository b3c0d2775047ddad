"""Who may import whom, and that the examples of the docstrings run."""

import ast
import doctest
import importlib
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxft

ROOT = Path(__file__).parents[1]

LAYERS = {
    0: ["tree", "typing", "version", "compilation", "document", "effort", "hugepages", "postponed"],
    1: ["graph", "source", "parallel"],
    2: ["models", "data", "strategies"],
    3: [
        "potential",
        "loss",
        "moments",
        "fisher",
        "fisherfile",
        "calibration",
        "architecture",
        "surgery",
        "momenthead",
        "testing",
    ],
    4: [
        "train",
        "progress",
        "timing",
        "validation",
        "evaluate",
        "md",
        "integrations",
        "calculator",
        "bundle",
        "describe",
        "changes",
        "e0s",
        "scratch",
        "preflight",
        "checkpoint",
        "display",
        "optimizer",
        "citation",
        "logs",
        "report",
    ],
    5: ["fit"],
    6: [
        "cli",
        "config",
        "recipe",
        "inputs",
        "objective",
        "fisherrun",
        "scratchrun",
        "run",
        "outcome",
        "adapter",
        "presets",
        "study",
        "surrogate",
        "inspection",
        "page",
    ],
}
"""Parts of jaxft by layer, as in docs/architecture.md; a part imports its own layer or lower."""

NEIGHBOURS = {"models", "data", "strategies"}
"""These do not import one another."""

CONVERT = {"cli", "run"}
"""Commands that convert or export; nothing else under jaxft imports converters."""

TORCH = {"converters/to_torch.py", "converters/verify.py"}

LAYER_OF = {part: layer for layer, parts in LAYERS.items() for part in parts}
SOURCES = sorted([*ROOT.glob("jaxft/**/*.py"), *ROOT.glob("converters/**/*.py")])
MODULES = [path for path in SOURCES if path.is_relative_to(ROOT / "jaxft")]


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(name):
    """``data`` of ``jaxft.data.frames``; the package itself is ``jaxft``."""
    return name.split(".")[1] if "." in name else name


def imported(path, source=None):
    """Every module that the file imports, wherever in it; names of modules, not of members."""
    tree = ast.parse(path.read_text() if source is None else source)
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    known = {name_of(p) for p in SOURCES}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in known else base)
    return found


def violations(path, source=None):
    """What is wrong with the imports of a module of jaxft."""
    part, wrong = part_of(name_of(path)), []
    for name in imported(path, source):
        root = name.split(".")[0]
        if root == "converters" and part not in CONVERT:
            wrong.append(f"{part} imports {name}")
        if root != "jaxft" or part in ("jaxft", "__main__"):
            continue
        other = part_of(name)
        if other in ("jaxft", "__main__"):  # the package shows what L4 and below offer
            if LAYER_OF[part] < 5 or other == "__main__":
                wrong.append(f"{part} imports the package {name} itself")
        elif other not in LAYER_OF:
            wrong.append(f"{part} imports {name}, which has no layer")
        elif LAYER_OF[other] > LAYER_OF[part]:
            wrong.append(f"{part} (L{LAYER_OF[part]}) imports {name} (L{LAYER_OF[other]})")
        elif {part, other} <= NEIGHBOURS and part != other:
            wrong.append(f"{part} imports its neighbour {name}")
    return wrong


def test_every_module_has_a_layer():
    parts = {part_of(name_of(path)) for path in MODULES} - {"jaxft", "__main__"}
    assert parts == set(LAYER_OF), "give the module a layer here and in docs/architecture.md"


def test_the_architecture_page_shows_the_same_layers():
    page = (ROOT / "docs" / "architecture.md").read_text()
    shown = {}
    for layer, line in re.findall(r"^L(\d)  (.*)$", page, re.MULTILINE):
        names = line.split("     ")[0].split()
        shown[int(layer)] = {name.removesuffix(".py").strip("/") for name in names}
    assert shown == {layer: set(parts) for layer, parts in LAYERS.items()}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path):
    assert violations(path) == []


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("graph.py", "from jaxft.potential import predict", "(L1) imports jaxft.potential (L3)"),
        ("tree.py", "def f():\n    import jaxft.graph", "tree (L0) imports jaxft.graph (L1)"),
        ("data/frames.py", "from jaxft import strategies", "its neighbour jaxft.strategies"),
        ("data/frames.py", "from ..models import mace", "its neighbour jaxft.models.mace"),
        ("loss.py", "import jaxft", "imports the package jaxft itself"),
        ("bundle.py", "from converters.reader import read", "bundle imports converters.reader"),
    ],
)
def test_imports_that_point_up_or_sideways_are_seen(file, source, message):
    (found,) = violations(ROOT / "jaxft" / file, source)
    assert message in found


def test_torch_is_imported_by_the_exporter_and_the_verifier_alone():
    """Nor e3nn's torch version, nor mace; mentioning a class by its name is no import."""
    guilty = {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if {"torch", "mace", "e3nn"} & {name.split(".")[0] for name in imported(path)}
    }
    assert guilty == TORCH


def test_torch_is_imported_when_used_and_not_before():
    for file in TORCH:
        top = ast.parse((ROOT / file).read_text()).body
        names = {
            name.split(".")[0]
            for node in top
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([a.name for a in node.names] + [getattr(node, "module", None) or ""])
        }
        assert not {"torch", "mace", "e3nn"} & names, file


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if path.name != "__main__.py"],  # which would run the command
    ids=name_of,
)
def test_docstring_examples_run(path, params):
    module = importlib.import_module(name_of(path))
    names = {name: getattr(jaxft.strategies, name) for name in jaxft.strategies.__all__}
    names |= {"jaxft": jaxft, "jax": jax, "np": np, "params": params}
    found = doctest.DocTestFinder().find(module, extraglobs=names)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in found:
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


def test_some_docstrings_have_examples():
    texts = [path.read_text() for path in MODULES if "strategies" in path.parts]
    assert sum(">>>" in text for text in texts) >= 2
