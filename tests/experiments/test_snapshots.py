"""Widths put together afterwards, from power averages that a run stored."""

import json

import jax
import numpy as np
import pytest

from experiments.config.schema import override
from experiments.data.splits import load_splits
from experiments.jobs.main import Trainer, share_of_runs, train_and_evaluate
from experiments.jobs.snapshots import Snapshots
from experiments.runtime.metrics import read_log
from experiments.training.averages import check_averages, parse
from experiments.training.loop import Hooks, train
from tests.helpers import largest_difference, quiet, run_job

AVERAGES = ("power:0.05", "power:0.1", "power:0.2", "posthoc:0.08")


def profile(width, steps):
    """Weights of a power average on each of its steps, by NumPy."""
    gamma = np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max()
    powers = np.arange(1, steps + 1) ** (gamma + 1.0)
    return np.diff(powers, prepend=0) / powers[-1]


@pytest.mark.slow
def test_a_width_afterwards_is_nearly_that_of_its_own_profile(tiny, tmp_path):
    """The weights of every step, averaged by NumPy with the profile of that width."""
    config = override(
        tiny, seeds=1, epochs=16, swa_epochs=(2,), averages=AVERAGES, width_plot=False
    )
    plan = config.plan
    arm = plan.longest
    seen, stored = [], Snapshots(tmp_path, arm)

    class Look(Hooks):
        def after_step(self, step, snapshot):
            taken = snapshot()
            seen.append(taken.state.params)

        def on_epoch_end(self, epoch, step, state):
            stored.keep(epoch, step, state)

    compiled = Trainer(config, load_splits(config.data, ("train", "test"))).compile(arm)
    train(compiled, 0, Look())
    found = stored.read(parse("posthoc:0.08"), len(seen), seen[-1])

    def of_profile(width):
        weights = profile(width, len(seen))

        def mean(*leaves):
            return np.tensordot(weights, np.stack(leaves).astype(np.float64), 1)

        return jax.tree.map(mean, *seen)

    expected = of_profile(0.08)
    assert largest_difference(found, expected) < 0.1 * largest_difference(
        of_profile(0.1), expected
    )


@pytest.mark.slow
def test_a_job_scores_widths_afterwards(tiny):
    config = override(tiny, seeds=1, averages=AVERAGES, width_plot=False)
    run_job(config)
    rows = json.loads(config.directory.results.read_text())["rows"]
    found = {row["label"]: row["loss"][0] for row in rows}
    kept = [found[f"power EMA {width}"] for width in ("0.05", "0.1", "0.2")]
    assert min(kept) - 0.02 <= found["power EMA 0.08, afterwards"] <= max(kept) + 0.02
    assert found["power EMA 0.08, afterwards"] not in kept


@pytest.mark.parametrize(
    "names",
    [
        ("posthoc:0.1",),
        ("power:0.05", "posthoc:0.1"),
        ("power:0.05", "power:0.1", "posthoc:0.15"),
        ("power:0.05", "power:0.1", "posthoc:0.04"),
    ],
)
def test_a_width_that_nothing_kept_encloses_is_refused(names):
    with pytest.raises(ValueError, match=r"averages contains 'posthoc:.*from two that"):
        check_averages(names)
    check_averages(("power:0.05", "power:0.2", "posthoc:0.1"))


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_shares_do_every_run_once(parts):
    """A child is where its parent is, and no share has much more to do than another."""
    steps = {"converged": 10, "swa": 5, "control": 5, "sgd": 15}
    roots = {"converged": "converged", "swa": "converged", "control": "converged"}
    roots["sgd"] = "sgd"
    shares = [share_of_runs(steps, roots, 3, (n + 1, parts)) for n in range(parts)]
    everything = [run for share in shares for run in share]
    assert len(everything) == len(set(everything)) == 12
    for share in shares:
        assert {roots[arm] for arm, seed in share} <= {arm for arm, seed in share}
        for seed in range(3):
            together = {(arm, seed) for arm in ("converged", "swa", "control")}
            assert together <= share or not together & share
    loads = [sum(steps[arm] for arm, _ in share) for share in shares]
    assert max(loads) - min(loads) <= 20


@pytest.mark.slow
def test_shares_together_are_the_whole_job(tiny, tmp_path):
    whole = override(tiny, seeds=2, width_plot=False, workdir=tmp_path / "whole")
    run_job(whole)
    parts = override(whole, workdir=tmp_path / "parts")
    for part in (2, 1):
        assert not train_and_evaluate(override(parts, share=(part, 2)), quiet())
        assert not parts.directory.results.exists()
    so_far = read_log(parts.directory.metrics)  # as `report` does
    assert all(so_far.of("test", "sgd", seed) for seed in range(2))
    run_job(parts)
    found = [json.loads(each.directory.results.read_text()) for each in (whole, parts)]
    assert found[0]["rows"] == found[1]["rows"]
    assert found[0]["comparisons"] == found[1]["comparisons"]
    logs = [read_log(each.directory.metrics) for each in (whole, parts)]
    for arm in whole.plan:
        for seed in range(2):
            tests = [log.of("test", arm.name, seed) for log in logs]
            assert tests[0] == tests[1]
    assert logs[1].of("test", "sgd", 0)
