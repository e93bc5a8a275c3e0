"""Compiles the cases for one target, in a process of its own.

usage: python -m tests.aot.worker TARGET [CASE ...]

A compiler may abort the process or run for long, so whoever starts it gives it a time
limit and reads as far as it came. Of each case it writes two lines of JSON,
``{"case"}`` before, and after ``{"case", "seconds", "cpu_seconds", "report"}``, or
``"error"`` in place of the report.
"""

import argparse
import dataclasses
import json
import pathlib
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from ..compiled import Report
from . import cases

CPU, TPU_2X4, TPU_2X2, H100 = "cpu", "tpu v5e:2x4", "tpu v5e:2x2", "8 x h100"


class Target(NamedTuple):
    """What to compile for, and what."""

    devices: Callable[[], cases.Devices]
    cases: Mapping[str, Callable[[cases.Devices], Report]]


def _tpu(topology: str) -> cases.Devices:
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def _h100() -> cases.Devices:
    description = pathlib.Path(__file__).with_name("h100.txtpb").read_text()
    return topologies.get_topology_desc(
        platform="cuda", target_config=description, topology="1x1x8"
    ).devices


_ALL = (
    cases.STEPS
    | cases.COMPENSATED
    | cases.AVERAGES
    | cases.NONFINITE
    | cases.SPREAD
    | cases.DEFECTS
)
#: Averaging the weights as received costs a CPU something, a TPU and a GPU nothing.
_CHIP_CASES = {name: case for name, case in _ALL.items() if "lagging" not in name}
_HOSTED = cases.HOSTED | cases.HOSTED_DEFECTS
#: Enough to see that the defects show; tests on arrays look at CPUs more closely.
CPU_CASES = {
    name: case
    for name, case in _ALL.items()
    if name.endswith("/auto") and name not in cases.SPREAD and "bfloat16" not in name
}
TARGETS = {
    CPU: Target(lambda: jax.devices("cpu")[:8], CPU_CASES),
    # An H100's description knows no host memory: arrays there compile as on the device.
    TPU_2X4: Target(lambda: _tpu("v5e:2x4"), _CHIP_CASES | _HOSTED),
    TPU_2X2: Target(lambda: _tpu("v5e:2x2"), cases.TRAINING),
    H100: Target(_h100, _CHIP_CASES),
}


def main() -> None:
    """Compiles and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("case", nargs="*", help="default: all of the target's")
    args = parser.parse_args()
    target = TARGETS[args.target]
    devices = target.devices()
    for name in args.case or target.cases:
        print(json.dumps({"case": name}), flush=True)
        found: dict[str, Any]
        start, cpu_start = time.perf_counter(), time.process_time()
        try:
            found = {"report": dataclasses.asdict(target.cases[name](devices))}
        except Exception:  # the others may still compile
            found = {"error": f"does not compile\n{traceback.format_exc()}"}
        took = {
            "seconds": round(time.perf_counter() - start, 1),
            "cpu_seconds": round(time.process_time() - cpu_start, 1),
        }
        print(json.dumps({"case": name, **took, **found}), flush=True)


if __name__ == "__main__":
    main()
