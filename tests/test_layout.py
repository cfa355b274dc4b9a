# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Import rules that let `save_pretrained` copy our files flat into a Hub repository."""

import ast
import importlib.util
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_imports

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("modeling_midivalle", "tokenization", "processing")
HUB_FILES = [f for p in PACKAGES for f in sorted((ROOT / p).rglob("*.py")) if f.name != "__init__.py"]


def imports(path):
    """Yield (level, module) of every import that is not inside a try block."""

    def walk(node):
        if isinstance(node, ast.Try):
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield 0, alias.name
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    yield from walk(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", HUB_FILES, ids=lambda p: p.name)
def test_imports_only_pypi_or_a_sibling(path):
    for level, module in imports(path):
        if level == 0:
            assert module.split(".")[0] not in (*PACKAGES, "scripts", "tests"), f"{module}: fails on the Hub"
            assert module != "__future__", "string annotations break config_class"
        else:
            assert level == 1 and module and "." not in module, "write `from .sibling import name`"
            assert (path.parent / f"{module}.py").is_file()


def test_flat_and_unique():
    names = [f.name for f in HUB_FILES]
    assert len(names) == len(set(names)) and all(f.parent.parent == ROOT for f in HUB_FILES)


def test_the_starter_carries_this_code():
    carried = {f.name: f.read_text() for f in (ROOT / "checkpoints" / "starter").glob("*.py")}
    assert carried == {f.name: f.read_text() for f in HUB_FILES}


def test_the_hub_scanner_finds_every_relative_import():
    for path in HUB_FILES:
        assert set(get_relative_imports(path)) == {m for level, m in imports(path) if level}, path.name


@pytest.mark.parametrize("package", PACKAGES)
def test_package(package):
    """Ours is imported, not a stranger's of the same name; its `__init__.py` defines no class (Auto loading fails)."""
    assert Path(importlib.util.find_spec(package).origin).is_relative_to(ROOT)
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]


def test_torchaudio_is_absent_or_works():
    """A CUDA build of torchaudio beside CPU torch raises OSError at import and breaks transformers."""
    if importlib.util.find_spec("torchaudio") is not None:
        importlib.import_module("torchaudio")
