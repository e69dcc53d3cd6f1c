"""Who may import whom, and how little importing the library costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cyclekd"

LAYERS = [
    {"errors", "structure", "checkpointing", "randomness", "_version"},
    {"outputs", "probe", "caches", "slots", "stem"},
    {"stacks", "looking", "losses"},
    {"passes"},
    {"stack_hooks"},
    {"reentry"},
    {"wrap"},
    {"report"},
    {"__init__"},
]
"""A module imports from rows above its own alone."""

STANDARD_OR_TORCH = {*sys.stdlib_module_names, "torch", "cyclekd"}


def imported(path):
    """Names that a file imports anywhere in it, other than for its types alone."""
    names = set()
    tree = ast.parse(path.read_text())
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def test_every_module_has_its_layer():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set().union(*LAYERS)


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_modules_import_from_lower_layers_torch_and_the_standard_library(path):
    row = next(i for i, layer in enumerate(LAYERS) if path.stem in layer)
    allowed = set().union(*LAYERS[:row])
    for name in imported(path):
        assert name.split(".")[0] in STANDARD_OR_TORCH, name
        if name.startswith("cyclekd."):
            assert name.removeprefix("cyclekd.") in allowed, name


def test_importing_the_library_loads_neither_timm_nor_transformers():
    code = "import sys, cyclekd; sys.exit(bool({'timm', 'transformers', 'accelerate'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
