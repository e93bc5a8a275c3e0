"""The averaging step as XLA compiles it for CPUs, eight TPU v5e chips and eight H100s.

No chip is needed: compilers take a description of one. They come with the extra
``aot``; where they are missing, only the CPU's cases run, or all fail if
``SWA_JAX_REQUIRE_COMPILERS`` is set. The cases of a target are compiled in a process of
their own, with a time limit, since the TPU's compiler may abort it.
"""

import math
import os
from collections.abc import Callable

import pytest

from ..compiled import Report
from . import cases, results
from .worker import CPU, H100, TARGETS, TPU_2X2, TPU_2X4

#: Seconds for all cases of a target: several times what two busy cores take.
TIME_LIMIT = 1800
#: Bytes a v5e chip needs for the training step, of 16 GB; measured: 3.1.
TRAINING_MEMORY = 4e9
#: Of an average in host memory, what may be on the device at a time. Measured: 0.26 if
#: it is whole, 0.23 if it is spread; 0.64 and 1.0 if leaves do not take turns.
IN_FLIGHT = 0.3

#: What each defect must break, by target. Not all do everywhere: XLA for TPU and GPU
#: fuses the reading of the old weights with the writing of the new, so that averaging
#: the old ones costs memory on a CPU only.
CAUGHT = {
    "branching/replicated/auto": {
        CPU: {"temporaries", "copies"},
        TPU_2X4: {"temporaries", "copies"},
        H100: {"temporaries", "copies"},
    },
    "branching window/replicated/auto": {
        TPU_2X4: {"temporaries", "copies"},
        H100: {"temporaries", "copies"},
    },
    "lagging/replicated/auto": {CPU: {"temporaries", "copies"}},
    "concatenated/replicated/auto": {
        CPU: {"temporaries"},
        TPU_2X4: {"copies"},  # of a tree so small that the chip's own memory holds it
        H100: {"temporaries", "copies"},
    },
    "concatenated/fsdp/auto": {
        CPU: {"collectives", "shardings"},
        TPU_2X4: {"collectives", "shardings"},
        H100: {"collectives", "shardings"},
    },
    "not donated/replicated/auto": {
        CPU: {"aliasing"},
        TPU_2X4: {"aliasing"},
        H100: {"aliasing"},
    },
}

ReportOf = Callable[[str, str], Report]


def check_compilers(target: str) -> None:
    """Skips the test, or fails it, where the target has no compiler."""
    missing = results.missing_compilers(target)
    if not missing:
        return
    message = f"{target} needs the extra `aot`: no {', '.join(missing)}"
    if os.environ.get("SWA_JAX_REQUIRE_COMPILERS"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def report_of(tmp_path_factory) -> ReportOf:
    """From target and case to what the executable does."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # shared, so that no target is compiled twice

    def report_of(target: str, case: str) -> Report:
        check_compilers(target)
        return results.report(folder, target, case, TIME_LIMIT)

    return report_of


def on(target: str, *values: str | set[str]):
    """A parameter set on a target, marked where it takes a compiler from outside."""
    mark = pytest.mark.slow if target == CPU else pytest.mark.aot
    return pytest.param(target, *values, marks=mark)


# The TPU's first and the GPU's last: two pytest workers begin at both ends.
ORDER = (TPU_2X4, CPU, H100)


def base_of(case: str) -> str:
    """The same step without averaging."""
    return f"sgd/{case.split('/')[1]}/auto"


def test_tree_is_resnet50s():
    assert len(cases.RESNET50) == 161
    assert sum(map(math.prod, cases.RESNET50)) == 25_557_032
    # So that a layout that splits every leaf leaves an eighth on each device.
    assert all(any(d % 8 == 0 for d in shape) for shape in cases.RESNET50)


@pytest.mark.parametrize(
    ("required", "outcome"),
    [("", pytest.skip.Exception), ("1", pytest.fail.Exception)],
)
def test_missing_compilers(monkeypatch, required, outcome):
    monkeypatch.setenv("SWA_JAX_REQUIRE_COMPILERS", required)
    monkeypatch.setattr(results, "missing_compilers", lambda target: [])
    check_compilers(H100)
    monkeypatch.setattr(results, "missing_compilers", lambda target: ["nvidia-nvvm"])
    with pytest.raises(outcome, match="8 x h100 needs the extra `aot`: no nvidia-nvvm"):
        check_compilers(H100)


@pytest.mark.parametrize(
    ("target", "case"),
    [
        on(target, case)
        for target in ORDER
        for case in cases.STEPS | cases.COMPENSATED
        if not case.startswith("sgd/") and case in TARGETS[target].cases
    ],
)
def test_step_is_in_place_and_silent(report_of, target, case):
    report, base = report_of(target, case), report_of(target, base_of(case))
    assert report.violations(base) == set(), report
    # The scale of what was compiled: a mean in float32, whole or an eighth of it.
    devices = 8 if "/fsdp/" in case else 1
    assert report.average == 25_557_032 * 4 / devices


@pytest.mark.parametrize(
    ("target", "case"),
    [
        on(target, case)
        for target in ORDER
        for case in cases.AVERAGES
        if case in TARGETS[target].cases
    ],
)
def test_every_average_is_in_place_and_silent(report_of, target, case):
    report, base = report_of(target, case), report_of(target, base_of(case))
    assert report.violations(base) == set(), report
    # One model is the scale, however many are kept: whole, or an eighth of it.
    size = sum(map(math.prod, cases.TAIL)) * (2 if "bfloat16" in case else 4)
    parts = 8 if "fsdp" in case or "spread" in case else 1
    assert report.average == size / parts
    # Weights, momenta, and what the average keeps of them.
    kept = {"ema": 1, "lawa": 4, "swag": 5}[case.split()[0].split("/")[0]]
    optimizer = 2 * (8 if "spread" in case else 1)
    counters = 8
    assert report.donated == (optimizer + kept) * report.average + counters


@pytest.mark.parametrize(
    ("target", "defect", "promises"),
    [
        on(target, defect, promises[target])
        for target in ORDER
        for defect, promises in CAUGHT.items()
        if target in promises
    ],
)
def test_defect_is_caught(report_of, target, defect, promises):
    report, base = report_of(target, defect), report_of(target, base_of(defect))
    assert promises <= report.violations(base), report


@pytest.mark.parametrize("target", ORDER)
def test_every_promise_is_broken_by_some_defect(target):
    broken = set().union(*(promises.get(target, ()) for promises in CAUGHT.values()))
    assert broken == {"temporaries", "aliasing", "copies", "collectives", "shardings"}


@pytest.mark.parametrize(
    ("target", "case"),
    [on(target, case) for target in (TPU_2X4, H100) for case in cases.SPREAD],
)
def test_spread_average_is_in_place_and_silent(report_of, target, case):
    report, base = report_of(target, case), report_of(target, base_of(case))
    assert report.violations(base) == set(), report
    assert report.average * 8 == base.average


@pytest.mark.parametrize("case", cases.HOSTED)
@pytest.mark.aot
def test_average_in_host_memory_stays_there(report_of, case):
    report, base = report_of(TPU_2X4, case), report_of(TPU_2X4, base_of(case))
    # Temporaries have a limit of their own: the average comes to the device in parts.
    assert report.violations(base) <= {"temporaries"}, report
    assert report.peak <= IN_FLIGHT * report.average, report
    # All of the mean is in host memory, and nothing else is.
    assert report.host_donated == report.average
    assert report.average * (8 if "spread" in case else 1) == base.average
    assert report.host_fresh == report.host_temporary == 0


@pytest.mark.parametrize("case", cases.HOSTED_DEFECTS)
@pytest.mark.aot
def test_leaves_that_do_not_take_turns_are_caught(report_of, case):
    report = report_of(TPU_2X4, case)
    assert report.host_aliased >= report.host_donated == report.average
    assert report.peak > 2 * IN_FLIGHT * report.average, report


@pytest.mark.parametrize(
    ("target", "case"),
    [on(target, case) for target in ORDER for case in cases.NONFINITE],
)
def test_search_for_nonfinite_weights_communicates_scalars(report_of, target, case):
    report, base = report_of(target, case), report_of(target, base_of(case))
    assert base.collectives == {}
    # A sum over each leaf, all in one call: the sum of nothing but zeros, or NaN.
    assert report.collectives == {"all-reduce": 1}
    assert report.communicated == len(cases.TAIL) * 4
    assert not report.violations(base) & {"aliasing", "shardings"}, report
    # The updated weights are read twice, so a chip keeps them in between.
    assert report.temporary <= (0.05 if target == CPU else 2) * report.average


@pytest.mark.aot
def test_resnet50_training_fits_four_chips(report_of):
    report = report_of(TPU_2X2, "training/replicated/auto")
    assert report.total < TRAINING_MEMORY
    # Everything is reused, and stays where it was. Temporaries and copies are the
    # activations'; what averaging adds to communication is checked above, on the
    # optimizer's step: compiling this one again without it would take minutes.
    assert not report.violations(report) & {"aliasing", "shardings"}, report
    # It is the data-parallel step: activations of 64 images, and gradients summed.
    assert report.temporary > 1e9
    assert report.collectives.get("all-reduce", 0) > 0
