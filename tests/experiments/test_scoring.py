import chex
import jax
import numpy as np
import pytest

from experiments.config.schema import override
from experiments.data.batches import EvalBatches, InputBatches
from experiments.data.dataset import Examples
from experiments.data.splits import MemorySplit
from experiments.training import scoring
from experiments.training.loop import Hooks, train
from experiments.training.scoring import averaged_variables
from tests.helpers import compile_arm, trainer


@pytest.fixture(scope="module")
def trained(tiny_model, split):
    return train(compile_arm(tiny_model, split, 3), 0)


def scorer(config, split, batch_size=8, limit=None, parallel="none"):
    # A batch that 8 devices can share; nothing is trained here.
    config = override(
        config, batch_size=16, eval_batch_size=batch_size, parallel=parallel
    )
    made = trainer(config, split)
    return made.scorer(dict.fromkeys(made.splits, limit) if limit else {})


def logits_of(config, state, images):
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = config.network.apply(variables, images, train=False)
    return np.asarray(logits, np.float64)


def calibration_error(probabilities, labels):
    """By hand, a bin at a time."""
    confidence, answers = probabilities.max(axis=1), probabilities.argmax(axis=1)
    total = 0.0
    for n in range(15):
        mine = (confidence > n / 15) & (confidence <= (n + 1) / 15)
        if mine.any():
            gap = confidence[mine].mean() - np.mean(answers[mine] == labels[mine])
            total += mine.mean() * abs(gap)
    return total


def test_evaluation_matches_numpy_on_every_example(tiny_model, trained, split):
    logits = logits_of(tiny_model, trained, split.examples.inputs)
    shifted = logits - logits.max(axis=1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    losses = -logs[np.arange(20), split.examples.labels]
    accuracy = np.mean(logits.argmax(axis=1) == split.examples.labels)
    for batch_size in (8, 20, 32):  # ragged, exact, all padding at once
        found = scorer(tiny_model, split, batch_size)
        score = found.score(found.network(trained, "iterate"), "test")
        assert score.accuracy == accuracy
        np.testing.assert_allclose(score.loss, losses.mean(), rtol=1e-5)
        error = calibration_error(np.exp(logs), split.examples.labels)
        np.testing.assert_allclose(score.ece, error, rtol=1e-5)
    # Of the first examples, up to whole batches.
    found = scorer(tiny_model, split, 8, limit=12)
    assert found.examples == {"train": 16, "validation": 16, "test": 16}
    score = found.score(found.network(trained, "iterate"), "test")
    np.testing.assert_allclose(score.loss, losses[:16].mean(), rtol=1e-5)
    # The ragged tail matters: without it, the oracle itself would differ.
    assert abs(losses.mean() - losses[:16].mean()) > 1e-3


def test_padding_does_not_count(tiny_model, trained, split):
    batch = EvalBatches(split, 8)[2]
    networks = [(trained.params, trained.batch_stats)]

    def sums():
        return jax.device_get(scoring._sums(tiny_model.network, networks, batch))

    clean = sums()
    padding = ~batch["mask"]
    # Labels that the network gets right on the padding: they would raise accuracy.
    answers = logits_of(tiny_model, trained, batch["inputs"]).argmax(axis=1)
    batch["labels"] = np.where(padding, answers, batch["labels"])
    chex.assert_trees_all_equal(sums(), clean)
    batch["mask"] = np.ones(8, bool)
    for found, before in zip(sums(), clean, strict=True):
        assert np.any(found != before)


def test_nothing_to_evaluate_is_an_error(tiny_model, trained, split):
    empty = MemorySplit(Examples(*(x[:0] for x in split.examples)))
    found = scorer(tiny_model, split)
    found._splits["test"] = empty
    with pytest.raises(ValueError, match="split test holds no example"):
        found.score(found.network(trained, "iterate"), "test")


def test_averaged_network_has_population_statistics(tiny_model, trained, split):
    assert len(InputBatches(split, 8)[2]) == 4  # ragged, and counted by its size
    before = jax.device_get(trained)
    params, batch_stats = scorer(tiny_model, split).network(trained, "average")
    average, _ = averaged_variables(trained)
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
    chex.assert_trees_all_equal(jax.device_get(trained), before)  # nothing was donated


@pytest.mark.parametrize("parallel", ["pmap", "shard_map", "jit"])
def test_every_device_takes_part(tiny_model, trained, split, parallel, monkeypatch):
    """Eight devices, batches of 16 and a ragged last one, as one device scores."""
    alone = scorer(tiny_model, split, 16)
    spread = scorer(tiny_model, split, 13, parallel=parallel)  # rounded up
    sums, seen = scoring._sums, []

    def recording(model, networks, batch):
        seen.append(batch["inputs"].sharding)
        return sums(model, networks, batch)

    for weights in ("iterate", "average"):
        expected, found = (s.network(trained, weights) for s in (alone, spread))
        # Means of at most 320 pixels in another order: some float32 eps of 1.2e-7.
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
        for leaf in jax.tree.leaves(found):
            assert len(leaf.sharding.device_set) == 8
        for name in ("train", "test"):
            score = alone.score(expected, name)
            seen.clear()
            with monkeypatch.context() as patch:
                patch.setattr(scoring, "_sums", recording)
                assert spread.score(found, name) == pytest.approx(score, rel=1e-5)
            assert [len(sharding.device_set) for sharding in seen] == [8, 8]
            assert not any(sharding.is_fully_replicated for sharding in seen)


def test_statistics_are_averaged_along(tiny_model, split):
    ends = []

    class Recorder(Hooks):
        def on_epoch_end(self, epoch, step, state):
            assert step == 3 * epoch
            ends.append(jax.device_get((state.params, state.batch_stats)))

    state = train(compile_arm(tiny_model, split, 3), 0, Recorder())
    expected = jax.tree.map(lambda *x: np.mean(np.array(x, np.float64), 0), *ends[-3:])
    chex.assert_trees_all_close(averaged_variables(state), expected, rtol=1e-5)


def test_average_without_finite_statistics_is_an_error_of_its_own(
    tiny_model, trained, split
):
    infinite = jax.tree.map(lambda p: np.inf * p, trained.params)
    with pytest.raises(FloatingPointError, match="is not finite"):
        scorer(tiny_model, split).fitted(infinite, trained.batch_stats)


AVERAGES = "ema:0.9", "power:0.2", "lawa:2", "swag:3"


@pytest.mark.slow
def test_other_averages_are_those_of_the_weights(tiny_model, split):
    """Each from the weights after every step, in float64."""
    config = override(tiny_model, averages=AVERAGES)
    history = []

    class Recorder(Hooks):
        def after_step(self, step, snapshot):
            history.append(jax.tree.map(np.float64, snapshot().state.params))

    arm = config.plan["swa3"]
    state = train(trainer(config, split).compile(arm), 0, Recorder())
    t = np.arange(1, 13)
    gamma = 3.0
    for _ in range(50):  # the width of Karras et al. 2024, solved for gamma
        gamma = np.sqrt((gamma + 1) / (gamma + 3)) / 0.2 - 2
    weights = {
        "ema:0.9": 0.9 ** (12 - t),
        "lawa:2": np.isin(t, (9, 12)),
        "power:0.2": (t / 12) ** (gamma + 1) - ((t - 1) / 12) ** (gamma + 1),
    }
    found = scorer(config, split)
    for name, unscaled in weights.items():
        ((params, batch_stats),) = found.networks(arm, state, name)
        share = np.array(unscaled, np.float64)
        share /= share.sum()
        expected = jax.tree.map(
            lambda *x, share=share: np.tensordot(share, np.stack(x), 1), *history
        )
        chex.assert_trees_all_close(params, expected, rtol=1e-4, atol=1e-5)
        fitted = found.fitted(params, state.batch_stats)[1]
        chex.assert_trees_all_equal(batch_stats, fitted)
    networks = found.networks(arm, state, "swag:3")
    assert len(networks) == 3
    score = found.score(networks, "test")
    predicted = []
    for params, batch_stats in networks:
        state = state._replace(params=params, batch_stats=batch_stats)
        logits = logits_of(config, state, split.examples.inputs)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        predicted.append(odds / odds.sum(axis=1, keepdims=True))
    assert np.abs(predicted[0] - predicted[1]).max() > 1e-3
    mean = np.mean(predicted, axis=0)
    labels = split.examples.labels
    loss = -np.log(mean[np.arange(20), labels]).mean()
    np.testing.assert_allclose(score.loss, loss, rtol=1e-4)
    assert score.accuracy == np.mean(mean.argmax(axis=1) == labels)
    np.testing.assert_allclose(score.ece, calibration_error(mean, labels), rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ema:1.5", r"'ema:1.5'; write each as ema:DECAY"),
        ("mean", "'mean'; write each as"),
        ("swag:0", "at least 1 sample"),
        ("lawa:half", "'lawa:half'"),
    ],
)
def test_an_average_that_is_none_is_an_error(tiny_model, name, message):
    with pytest.raises(ValueError, match=message):
        override(tiny_model, averages=(name,))
    with pytest.raises(ValueError, match="must appear once"):
        override(tiny_model, averages=("ema:0.9", "ema:0.90"))
