"""The source distribution holds what its tests need."""

import pathlib
import re
import subprocess
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
#: What hatchling adds of its own.
ALWAYS = {".gitignore", "pyproject.toml"}


def included() -> set[str]:
    """Files and directories of the repository's root."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert all(pattern.startswith("/") for pattern in patterns)  # or it is anywhere
    return {pattern[1:] for pattern in patterns} | ALWAYS


def test_what_is_included_is_there():
    for name in included():
        assert (ROOT / name).exists(), name


def test_all_that_is_tracked_is_included():
    if not ROOT.joinpath(".git").exists():
        pytest.skip("unpacked from the distribution")
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert {line.partition("/")[0] for line in tracked.splitlines()} == included()


def test_what_tests_open_is_included():
    opened = set()
    for path in (ROOT / "tests").rglob("*.py"):
        for up, name in re.findall(
            r'(?:ROOT|parents\[(\d)\]) / "([^"]+)', path.read_text()
        ):
            base = path.parents[int(up)] if up else ROOT
            opened.add((base / name).relative_to(ROOT).parts[0])
    assert opened >= {".ci", "README.md", "docs", "pyproject.toml", "tests"}
    assert opened <= included()
