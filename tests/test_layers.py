"""Imports inside the package point down the layers of docs/architecture.md, and no method imports another."""

import ast
from functools import cache
from pathlib import Path

import pytest

import nestling

ROOT = Path(nestling.__file__).parent
# From the bottom up. Parts of one layer may import one another, methods excepted.
LAYERS = (
    {"errors", "processes", "experts", "quiet", "runs"},
    {"anatomy"},
    {"surgery", "ranking", "shape", "cost", "budget"},
    {"train", "evaluate", "report", "data", "hub"},
    {"distill", "elastic", "dmc", "moe", "pretrain", "search", "plan"},
    {"recipes"},
    {"cli"},
)
METHODS = 4
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
ABOVE_ALL = {"__init__", "__main__"}  # the public face, and `python -m nestling`


@cache
def imported(path):
    """The parts of the package that a file imports, wherever in it, with the names it takes from them."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "nestling":
            found += [(alias.name, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nestling."):
            found += [(node.module.split(".")[1], alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found += [(name[1], name[-1]) for name in names if name[0] == "nestling" and len(name) > 1]
    return found


def part(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def allowed(own, other):
    """Whether a part may import another."""
    if own == other:
        return True
    return LEVEL[other] < LEVEL[own] or (LEVEL[other] == LEVEL[own] != METHODS)


@pytest.mark.parametrize("own", sorted(LEVEL))
def test_imports_point_down(own):
    files = [path for path in ROOT.rglob("*.py") if part(path) == own]
    assert files
    wrong = [
        f"{path.relative_to(ROOT)}: {other}" for path in files for other, _ in imported(path) if not allowed(own, other)
    ]
    assert not wrong


def test_every_part_has_its_layer():
    assert {part(path) for path in ROOT.rglob("*.py")} == set(LEVEL) | ABOVE_ALL


def test_private_names_stay_in_their_part():
    """A module or a name with an underscore is used inside its own part only."""
    for path in ROOT.rglob("*.py"):
        for other, name in imported(path):
            assert not name.startswith("_") or other == part(path), f"{path.relative_to(ROOT)} takes {name}"


def test_the_rule_refuses():
    """Negative control: up, and sideways between methods."""
    assert not allowed("anatomy", "surgery")
    assert not allowed("distill", "elastic")
    assert not allowed("surgery", "hub")
    assert allowed("recipes", "anatomy")
    assert allowed("train", "data")
