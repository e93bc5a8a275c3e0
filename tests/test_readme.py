"""README's claims that can be run: its examples, its commands, its names."""

import pathlib
import re

import pytest

import swa_jax

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_run_as_they_stand(number, capsys):
    exec(compile(EXAMPLES[number], f"README example {number}", "exec"), {})
    accuracy = float(capsys.readouterr().out.split()[-1])
    # Chance is 0.1; a single model of this size gets about 0.9 on these writers.
    assert 0.85 < accuracy <= 1.0


def test_there_are_examples():
    assert len(EXAMPLES) >= 2


def test_ci_runs_the_very_test_command():
    commands = re.findall(r"```sh\n(.*?)\n```", README, re.DOTALL)
    (test_command,) = (c for c in commands if c.endswith("-m pytest"))
    assert "\n" not in test_command
    assert test_command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_every_public_name_is_explained():
    for name in swa_jax.__all__:
        assert f"`{name}" in README, f"README does not mention {name}"
        assert getattr(swa_jax, name).__doc__, f"{name} has no docstring"
