"""What CONTRIBUTING shows works as it stands."""

import dataclasses
import pathlib
import re
from typing import Any

import numpy as np
import pytest

from experiments.config.schema import override, settings_of
from tests.helpers import run_job

PAGE = (pathlib.Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()


@pytest.mark.slow
def test_a_network_is_one_file(tiny):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    namespace: dict[str, Any] = {"__name__": "mlp"}
    exec(compile(example, "mlp.py", "exec"), namespace)
    config = dataclasses.replace(tiny, model=namespace["MLP"]())
    assert settings_of(config)["hidden"] == [64]
    rows = run_job(override(config, hidden=(8, 8), seeds=1))
    # No BatchNorm, no line of it.
    assert [row["weights"] for row in rows] == ["iterate", "average", "average"]
    assert np.isfinite([row["loss"] for row in rows]).all()


def test_the_rooms_are_those_that_are_there():
    root = pathlib.Path(__file__).parents[2] / "experiments"
    rooms = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    there = {path.name for path in root.iterdir() if (path / "__init__.py").exists()}
    assert set(rooms) == there
    # Imports point to the left alone.
    order = re.findall(r"`(\w+)`", PAGE[PAGE.index("Imports") : PAGE.index("Each")])
    assert order[-1] == "__main__"
    for number, room in enumerate(order[:-1]):
        for path in (root / room).rglob("*.py"):
            seen = re.findall(
                r"^\s*(?:from|import) experiments(?:\.| import )(\w+)",
                path.read_text(),
                re.MULTILINE,
            )
            for other in seen:
                assert order.index(other) <= number, f"{path} imports {other}"
