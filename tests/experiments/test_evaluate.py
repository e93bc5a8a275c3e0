import chex
import jax
import numpy as np
import pytest

import swa_jax
from experiments import data
from experiments.evaluate import averaged_network, evaluate
from experiments.train import make_arm, make_model, train


@pytest.fixture(scope="module")
def trained(tiny_model, examples):
    arm = make_arm(tiny_model, examples, 3)
    return make_model(tiny_model), train(tiny_model, arm, 0, examples)


def logits_of(model, state, images):
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return np.asarray(model.apply(variables, images, train=False), np.float64)


def test_evaluation_matches_numpy_on_every_example(trained, examples):
    model, state = trained
    logits = logits_of(model, state, examples.images)
    shifted = logits - logits.max(axis=1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    losses = -logs[np.arange(20), examples.labels]
    accuracy = np.mean(logits.argmax(axis=1) == examples.labels)
    for batch_size in (8, 20, 32):  # ragged, exact, all padding at once
        batches = data.eval_batches(examples, batch_size)
        got = evaluate(model, state.params, state.batch_stats, batches)
        assert got.accuracy == accuracy
        np.testing.assert_allclose(got.loss, losses.mean(), rtol=1e-5)
    # The ragged tail matters: without it, the oracle itself would differ.
    assert abs(losses.mean() - losses[:16].mean()) > 1e-3


def test_padding_does_not_count(trained, examples):
    model, state = trained
    batches = data.eval_batches(examples, 8)
    clean = evaluate(model, state.params, state.batch_stats, batches)
    padding = ~batches[-1]["mask"]
    # Labels that the network gets right on the padding: they would raise accuracy.
    answers = logits_of(model, state, batches[-1]["images"]).argmax(axis=1)
    batches[-1]["labels"] = np.where(padding, answers, batches[-1]["labels"])
    assert evaluate(model, state.params, state.batch_stats, batches) == clean
    batches[-1]["mask"] = np.ones(8, bool)
    assert evaluate(model, state.params, state.batch_stats, batches) != clean


def test_nothing_to_evaluate_is_an_error(trained):
    model, state = trained
    with pytest.raises(ValueError, match="batches hold no example"):
        evaluate(model, state.params, state.batch_stats, [])


def test_averaged_network_has_population_statistics(trained, examples):
    model, state = trained
    batches = data.image_batches(examples, 8)
    assert len(batches[-1]) == 4  # ragged, and counted by its size
    before = jax.device_get(state)
    params, batch_stats = averaged_network(model, state, batches)
    average = swa_jax.swa_params(state.opt_state, state.params)
    chex.assert_trees_all_equal(params, average)
    # Oracle: the first convolution of all images at once, in float64.
    images = np.float64(examples.images) / 16 - 0.5
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


def test_batchnorm_pass_can_be_left_out(trained):
    model, state = trained
    params, batch_stats = averaged_network(model, state, None)
    chex.assert_trees_all_equal(batch_stats, state.batch_stats)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(params, state.params, rtol=1e-4)
