import chex
import jax
import numpy as np
import pytest

from experiments import data, plans
from experiments.evaluate import (
    averaged_network,
    averaged_variables,
    evaluate,
    fit_batch_stats,
)
from experiments.networks import make_model
from experiments.train import Hooks, compile_arm, train


def make_arm(config, split, window):
    """Compile the arm that averages the last `window` epochs; 0: the plain one."""
    name = f"swa{window}" if window else "sgd"
    (arm,) = (arm for arm in plans.make_arms(config) if arm.name == name)
    return compile_arm(config, arm, split)


@pytest.fixture(scope="module")
def trained(tiny_model, split):
    arm = make_arm(tiny_model, split, 3)
    return make_model(tiny_model, split), train(tiny_model, arm, 0, split)


def logits_of(model, state, images):
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return np.asarray(model.apply(variables, images, train=False), np.float64)


def test_evaluation_matches_numpy_on_every_example(trained, split):
    model, state = trained
    logits = logits_of(model, state, split.examples.inputs)
    shifted = logits - logits.max(axis=1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    losses = -logs[np.arange(20), split.examples.labels]
    accuracy = np.mean(logits.argmax(axis=1) == split.examples.labels)
    for batch_size in (8, 20, 32):  # ragged, exact, all padding at once
        batches = data.EvalBatches(split, batch_size)
        got = evaluate(model, state.params, state.batch_stats, batches)
        assert got.accuracy == accuracy
        np.testing.assert_allclose(got.loss, losses.mean(), rtol=1e-5)
    # The ragged tail matters: without it, the oracle itself would differ.
    assert abs(losses.mean() - losses[:16].mean()) > 1e-3


def test_padding_does_not_count(trained, split):
    model, state = trained
    batches = list(data.EvalBatches(split, 8))
    clean = evaluate(model, state.params, state.batch_stats, batches)
    padding = ~batches[-1]["mask"]
    # Labels that the network gets right on the padding: they would raise accuracy.
    answers = logits_of(model, state, batches[-1]["inputs"]).argmax(axis=1)
    batches[-1]["labels"] = np.where(padding, answers, batches[-1]["labels"])
    assert evaluate(model, state.params, state.batch_stats, batches) == clean
    batches[-1]["mask"] = np.ones(8, bool)
    assert evaluate(model, state.params, state.batch_stats, batches) != clean


def test_nothing_to_evaluate_is_an_error(trained):
    model, state = trained
    with pytest.raises(ValueError, match="batches hold no example"):
        evaluate(model, state.params, state.batch_stats, [])


def test_averaged_network_has_population_statistics(trained, split):
    model, state = trained
    batches = data.InputBatches(split, 8)
    assert len(batches[-1]) == 4  # ragged, and counted by its size
    before = jax.device_get(state)
    params, batch_stats = averaged_network(model, state, batches)
    average, _ = averaged_variables(state)
    chex.assert_trees_all_equal(params, average)
    # Oracle: the first convolution of all images at once, in float64.
    images = np.float64(split.examples.inputs) / 16 - 0.5
    padded = np.pad(images, ((0, 0), (0, 1), (0, 1), (0, 0)))  # SAME, stride 2
    kernel = np.float64(params["Conv_0"]["kernel"])
    outputs = np.stack(
        [
            np.einsum("bijc,ijcd->bd", padded[:, r : r + 3, c : c + 3], kernel)
            for r in range(0, 8, 2)
            for c in range(0, 8, 2)
        ]
    )
    layer = batch_stats["BatchNorm_0"]
    np.testing.assert_allclose(layer["mean"], outputs.mean((0, 1)), rtol=1e-4)
    np.testing.assert_allclose(layer["var"], outputs.var((0, 1)), rtol=1e-4)
    chex.assert_trees_all_equal(jax.device_get(state), before)  # nothing was donated


def test_statistics_are_averaged_along(tiny_model, split):
    ends = []

    class Recorder(Hooks):
        def on_epoch_end(self, epoch, state):
            del epoch
            ends.append(jax.device_get((state.params, state.batch_stats)))

    state = train(tiny_model, make_arm(tiny_model, split, 3), 0, split, Recorder())
    expected = jax.tree.map(lambda *x: np.mean(np.float64(x), 0), *ends[-3:])
    chex.assert_trees_all_close(averaged_variables(state), expected, rtol=1e-5)


def test_average_without_finite_statistics_is_an_error_of_its_own(trained, split):
    model, state = trained
    infinite = jax.tree.map(lambda p: np.inf * p, state.params)
    batches = data.InputBatches(split, 8)
    with pytest.raises(FloatingPointError, match="is not finite"):
        fit_batch_stats(model, infinite, state.batch_stats, batches)
