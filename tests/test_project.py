# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""The repository itself: pins, sizes, paths, the README's file tree and example, the bundled prompts."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import soundfile
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
STARTER = ROOT / "checkpoints" / "starter"
MIB = 2**20
IGNORED = {".git", ".venv", "runs", "out", "build", "dist", "__pycache__"}  # as .gitignore has it
IGNORED |= {".pytest_cache", ".ruff_cache", ".cache", "demo.wav", "demo.json", "demo.png"}
TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".json", ".sh", ""}
MACHINE_PATH = re.compile(r"(?<![\w.~})-])/(?:work|home|root|Users|mnt|opt)/\w")


def project_files():
    """Every file that git would track: what `git ls-files` says if this is a checkout, a walk if not."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if (ROOT / ".git").exists():
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
        return sorted({ROOT / name for name in names if name and (ROOT / name).is_file()})
    found = (p for p in ROOT.rglob("*") if p.is_file() and p.relative_to(ROOT).parts[0] not in IGNORED)
    return sorted(p for p in found if "__pycache__" not in p.parts and ".egg-info" not in str(p))


def requirements():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return {r.name: r for r in (Requirement(line) for line in lines if line and not line.startswith("#"))}


def test_no_path_of_a_machine():
    texts = [p for p in project_files() if p.suffix in TEXT]
    assert len(texts) > 20
    found = [
        f"{p.relative_to(ROOT)}:{number}: {line.strip()}"
        for p in texts
        for number, line in enumerate(p.read_text(encoding="utf-8").splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert not found


def test_every_python_file_has_the_licence_line_and_a_docstring():
    header = "# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.\n"
    for path in project_files():
        if path.suffix == ".py" and not path.is_relative_to(STARTER):
            text = path.read_text()
            assert text.startswith(header) and ast.get_docstring(ast.parse(text)), path


def test_commands_in_docstrings_are_broken_where_the_shell_takes_it():
    """`--help` prints them: one backslash at the end of a line would join it with the next."""
    for path in sorted((ROOT / "scripts").glob("*.py")):
        lines = ast.get_docstring(ast.parse(path.read_text())).splitlines()
        assert not [line for line in lines if len(line) > 120], path


def test_every_requirement_is_pinned_and_within_the_bounds_of_pyproject():
    pins = requirements()
    for name, requirement in pins.items():
        assert [s.operator for s in requirement.specifier] == ["=="], name
    assert not {"torch", "torchaudio", "torchcodec", "encodec", "transkun"} & set(pins)
    bounds = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for bound in map(Requirement, bounds):
        if bound.name != "torch":
            assert bound.specifier.contains(next(iter(pins[bound.name].specifier)).version), bound.name
    assert Version(next(iter(pins["symusic"].specifier)).version) < Version("0.6")


@pytest.mark.parametrize("name", sorted(requirements()))
def test_the_pinned_version_is_installed(name):
    assert requirements()[name].specifier.contains(version(name)), "run `make install`"


PRETENDED = """
import importlib, importlib.metadata
found = importlib.metadata.version
importlib.metadata.version = lambda name: "4.57.3" if name == "transformers" else found(name)
for name in ("modeling_midivalle", "processing"):
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(str(error).splitlines()[0])
"""


def test_an_older_transformers_is_told_which_it_has_to_be():
    """Remote code meets whatever is installed."""
    bounds = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    floor = next(line for line in bounds if line.startswith("transformers")).split(",")[0]
    said = subprocess.run([sys.executable, "-c", PRETENDED], cwd=ROOT, capture_output=True, text=True).stdout
    wanted = f"{floor} is required for a normal functioning of this module, but found transformers==4.57.3."
    assert said.splitlines() == [wanted, wanted]


def test_torchaudio_is_absent_or_works():
    """Beside a CPU torch PyPI's torchaudio raises OSError, and `import transformers.processing_utils` with it."""
    if importlib.util.find_spec("torchaudio") is not None:
        importlib.import_module("torchaudio")


def test_the_repository_stays_small():
    sizes = {p: p.stat().st_size for p in project_files()}
    assert sum(sizes.values()) <= 56 * MIB
    assert sum(size for p, size in sizes.items() if p.is_relative_to(STARTER)) <= 40 * MIB
    assert max(sizes.values()) <= 15 * MIB


def test_the_readme_tree_is_the_folder():
    tree = re.search(r"## Files\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    folder, listed = Path(), set()
    for line in tree.splitlines():
        name = line.split()[0]
        if name.endswith("/"):
            folder = Path(name)
            assert (ROOT / folder).is_dir(), f"README lists {name}, which is not there"
        else:
            listed.add(str(folder / name) if line.startswith(" ") else name)
    real = {str(p.relative_to(ROOT)) for p in project_files() if not p.is_relative_to(STARTER)}
    real = {name for name in real if not name.endswith("__init__.py")}
    assert listed - real == set() and real - listed == set()


def test_the_starter_carries_its_card():
    assert (STARTER / "README.md").read_text() == (ROOT / "model_cards" / "midivalle.md").read_text()


def test_nothing_is_left_to_fill_in():
    documents = [p for p in project_files() if p.suffix == ".md"]
    open_places = {str(p.relative_to(ROOT)): re.findall(r"\{\{\w+\}\}", p.read_text()) for p in documents}
    assert not {name: places for name, places in open_places.items() if places}


def test_the_demo_renders_a_bundled_file():
    demo = re.search(r"^DEMO := (.+)$", (ROOT / "Makefile").read_text(), re.M)[1]
    assert (ROOT / demo).is_file() and demo in (ROOT / "README.md").read_text()


def test_bundled_prompts():
    entries = json.loads((STARTER / "prompts" / "prompts.json").read_text())
    assert len(entries) >= 4 and entries[0]["name"] == "steinway_studio"
    assert len({(e["piano"], e["room"]) for e in entries}) == len(entries)
    for entry in entries:
        assert all(entry[key] for key in ("name", "description", "piano", "room", "licence", "attribution"))
        info = soundfile.info(STARTER / "prompts" / f"{entry['name']}.flac")
        assert (info.samplerate, info.channels, info.frames) == (32_000, 1, 192_000)
        assert (STARTER / "prompts" / f"{entry['name']}.mid").is_file()
        assert f"`{entry['name']}`" in (ROOT / "README.md").read_text()


def test_the_readme_example_runs_without_the_repository(tmp_path):
    """The ten lines, in a fresh process whose path lacks this folder, beside nothing but the starter and the MIDI."""
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    assert len(example.strip().splitlines()) <= 10
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    (tmp_path / "space").symlink_to(ROOT / "space")
    hide = f"import sys; sys.path[:] = [p for p in sys.path if p not in ('', {str(ROOT)!r})]\n"
    check = "assert not {'tokenization', 'processing', 'modeling_midivalle'} & set(sys.modules)\n"
    environment = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", hide + example + check], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    wave, rate = soundfile.read(tmp_path / "chopin.wav")
    assert rate == 32_000 and len(wave) == 192_000
    assert (wave**2).mean() > 1e-6
