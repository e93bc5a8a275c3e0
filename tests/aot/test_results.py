"""What becomes of cases when the process that compiles them ends too early."""

import sys
import time

import pytest

from . import results, worker

#: A worker whose cases are what shall happen to it.
FAKE = """
import json, os, sys, time
for name in sys.argv[1:]:
    if name.startswith("unavailable"):
        sys.exit("no such compiler")
    print(json.dumps({"case": name}), flush=True)
    if name.startswith("abort"):
        print("about to abort in", name, file=sys.stderr, flush=True)
        os.abort()
    if name.startswith("hang"):
        time.sleep(60)
    found = {"error": "no"} if name.startswith("error") else {"report": {}}
    print(json.dumps({"case": name, **found}), flush=True)
"""
TIME_LIMIT = 30


def compile_all(tmp_path, *cases, time_limit=TIME_LIMIT):
    command = [sys.executable, "-c", FAKE]
    found = results.compile_all(command, cases, tmp_path / "fake", time_limit)
    assert found.keys() == set(cases)
    assert all(result["case"] == case for case, result in found.items())
    return found


def good(result):
    return "report" in result and "error" not in result


def test_all_cases_are_kept(tmp_path):
    found = compile_all(tmp_path, "good 1", "error", "good 2")
    assert good(found["good 1"])
    assert good(found["good 2"])
    assert found["error"] == {"case": "error", "error": "no"}


def test_abort_loses_the_case_that_was_being_compiled_only(tmp_path):
    found = compile_all(tmp_path, "good 1", "abort 1", "good 2", "abort 2", "good 3")
    assert all(good(found[f"good {i}"]) for i in (1, 2, 3))
    for case in ("abort 1", "abort 2"):
        assert found[case]["error"].startswith("was being compiled when the worker")
        assert "status -6" in found[case]["error"]
        assert f"about to abort in {case}" in found[case]["error"]
    # Each with the last words of its own worker.
    assert "abort 1" not in found["abort 2"]["error"]


def test_abort_of_all_cases_comes_to_an_end(tmp_path):
    found = compile_all(tmp_path, "abort 1", "abort 2")
    assert all("being compiled" in result["error"] for result in found.values())


def test_worker_that_cannot_begin_is_not_restarted(tmp_path):
    found = compile_all(tmp_path, "good", "unavailable 1", "unavailable 2")
    assert good(found["good"])
    for case in ("unavailable 1", "unavailable 2"):
        assert found[case]["error"].startswith("not begun when the worker ended with")
        assert "no such compiler" in found[case]["error"]


def test_time_limit_holds_for_all_cases_together(tmp_path):
    start = time.monotonic()
    found = compile_all(tmp_path, "good", "hang 1", "hang 2", time_limit=2)
    assert time.monotonic() - start < 20
    assert good(found["good"]) or "not begun" in found["good"]["error"]
    assert "the worker was stopped" in found["hang 1"]["error"]
    assert "not begun when" in found["hang 2"]["error"]


def test_report_names_target_case_and_error(tmp_path, monkeypatch):
    def compile_all(command, cases, stem, time_limit):
        del command, stem, time_limit
        return {case: {"case": case, "error": "last words"} for case in cases}

    monkeypatch.setattr(results, "compile_all", compile_all)
    case = "training/replicated/auto"
    for _ in range(2):  # the second time from the file
        with pytest.raises(RuntimeError, match=f"v5e:2x2: {case}: last words"):
            results.report(tmp_path, worker.TPU_2X2, case, TIME_LIMIT)
        monkeypatch.setattr(results, "compile_all", None)
