"""``requirements-tpu.txt`` names what ``pyproject.toml`` does, for a TPU machine."""

import pathlib
import re
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
#: The form that both files keep to: a name, extras, and what is asked of the version.
_REQUIREMENT = re.compile(r"(\w[\w.-]*)(?:\[([\w,-]+)\])?((?:[<>=!~]=?[\w.*]+,?)*)")


def parse(requirement: str) -> tuple[str, frozenset[str], str]:
    """Name as the index spells it, extras, and versions of a requirement."""
    match = _REQUIREMENT.fullmatch(requirement.strip())
    assert match, f"neither a name, extras nor versions: {requirement!r}"
    name, extras, versions = match.groups()
    return (
        re.sub(r"[-_.]+", "-", name).lower(),
        frozenset((extras or "").split(",")) - {""},
        versions,
    )


def requirements() -> dict[str, tuple[frozenset[str], str]]:
    """What the file installs."""
    lines = (ROOT / "requirements-tpu.txt").read_text().splitlines()
    stripped = (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines)
    parsed = [parse(line) for line in stripped if line]
    names = [name for name, _, _ in parsed]
    assert len(names) == len(set(names)), f"named twice: {names}"
    return {name: (extras, versions) for name, extras, versions in parsed}


def project() -> dict[str, tuple[frozenset[str], str]]:
    """What the library and its experiments ask for."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = table["dependencies"] + table["optional-dependencies"]["experiments"]
    return {name: (extras, versions) for name, extras, versions in map(parse, named)}


def test_tpu_requirements_are_the_projects_plus_the_tpu_runtime():
    expected = project()
    extras, versions = expected["jax"]
    expected["jax"] = (extras | {"tpu"}, versions)
    assert requirements() == expected


@pytest.mark.parametrize(
    ("requirement", "parsed"),
    [
        ("jax[tpu]>=0.7.1", ("jax", {"tpu"}, ">=0.7.1")),
        ("array_record>=0.7,<1", ("array-record", set(), ">=0.7,<1")),
        ("Tyro", ("tyro", set(), "")),
    ],
)
def test_parse(requirement, parsed):
    assert parse(requirement) == parsed


@pytest.mark.parametrize("line", ["-r other.txt", "git+https://x.org/y", "a; b == 'c'"])
def test_parse_refuses_what_it_cannot_compare(line):
    with pytest.raises(AssertionError, match="neither a name"):
        parse(line)
