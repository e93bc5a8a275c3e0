import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import swa_jax
from experiments.config.schema import override
from experiments.data.batches import Batch
from experiments.training.loop import Hooks, _finite, train
from experiments.training.optimizer import make_optimizer
from experiments.training.step import Metrics, make_train_step
from tests.compiled import programs
from tests.helpers import compile_arm, train_batches


class Recorder(Hooks):
    """Keeps everything that training shows."""

    def __init__(self):
        self.steps, self.reports, self.ends = [], [], []

    def on_step(self, step, loss, learning_rate):
        self.steps.append((step, loss, learning_rate))

    def on_report(self, report):
        self.reports.append(report)

    def on_epoch_end(self, epoch, step, state):
        self.ends.append((epoch, jax.device_get(state)))


@pytest.mark.parametrize("window", [1, 3])
def test_average_is_the_mean_of_epoch_ends(tiny, split, window):
    recorder = Recorder()
    arm = compile_arm(tiny, split, window)
    state = train(arm, 0, recorder)
    assert [epoch for epoch, _ in recorder.ends] == [1, 2, 3, 4]
    iterates = [
        {"params": end.params, "batch_stats": end.batch_stats}
        for _, end in recorder.ends[-window:]
    ]
    expected = jax.tree.map(
        lambda *leaves: np.mean(leaves, axis=0, dtype=np.float64), *iterates
    )
    found = swa_jax.swa_state(state.opt_state)
    assert found.num_averaged == window
    assert found.num_updates == 12
    # A running mean of 3 float32 numbers: a few units in the last place.
    chex.assert_trees_all_close(found.avg_params, expected, rtol=1e-6, atol=1e-7)
    if window > 1:
        moved = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), expected, iterates[-1])
        assert min(jax.tree.leaves(moved)) > 1e-6  # it is not just the last iterate


def test_two_steps_match_the_formula_of_sgd(tiny, split):
    """v <- m v + (g + wd p), p <- p - lr v, with decay for kernels only."""
    config = override(tiny, weight_decay=0.1)
    model = config.network
    batches = [
        Batch(
            inputs=split.examples.inputs[i : i + 8],
            labels=split.examples.labels[i : i + 8],
        )
        for i in (0, 8)
    ]

    def loss_fn(params, batch_stats, batch):
        logits, _ = model.apply(
            {"params": params, "batch_stats": batch_stats},
            batch["inputs"],
            train=True,
            mutable=["batch_stats"],
        )
        logs = jax.nn.log_softmax(logits)[jnp.arange(8), batch["labels"]]
        return -jnp.mean(logs)

    value_and_grad = jax.jit(jax.value_and_grad(loss_fn))
    arm = compile_arm(config, split, 0)
    state = arm.init(jax.random.key(1))
    params = jax.device_get(state.params)
    velocity = jax.tree.map(np.zeros_like, params)
    for step, batch in enumerate(batches):
        batch_stats = jax.device_get(state.batch_stats)
        loss, grads = value_and_grad(params, batch_stats, batch)
        rate = arm.learning_rates[step]
        velocity = jax.tree.map(
            lambda v, g, p: 0.9 * v + g + 0.1 * p * (p.ndim > 1),
            velocity,
            jax.device_get(grads),
            params,
        )
        params = jax.tree.map(lambda p, v, r=rate: p - r * v, params, velocity)
        state, metrics = arm.step(state, batch)
        np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)
        # float32 gradients, compiled differently.
        chex.assert_trees_all_close(state.params, params, rtol=1e-4, atol=1e-5)


def test_metrics_are_those_of_the_weights_before_the_update(tiny, split):
    arm = compile_arm(tiny, split, 0)
    state = arm.init(jax.random.key(1))
    model = tiny.network
    batch = Batch(inputs=split.examples.inputs[:8], labels=split.examples.labels[:8])
    logits, updated = model.apply(
        {"params": state.params, "batch_stats": state.batch_stats},
        batch["inputs"],
        train=True,
        mutable=["batch_stats"],
    )
    expected = np.mean(np.argmax(logits, axis=-1) == batch["labels"])
    state, metrics = arm.step(state, batch)
    assert metrics.accuracy == expected
    chex.assert_trees_all_close(
        state.batch_stats, updated["batch_stats"], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("window", [0, 3])
def test_step_is_compiled_once_and_donates(tiny, split, window):
    arm = compile_arm(tiny, split, window)
    chex.clear_trace_counter()
    like = jax.eval_shape(arm.init, jax.random.key(0)).batch_stats
    optimizer = make_optimizer(tiny.optimizer, arm.arm, 3, like)
    step = make_train_step(tiny.network, optimizer)
    once = jax.jit(chex.assert_max_traces(step, n=1), donate_argnums=0)
    train(dataclasses.replace(arm, step=once), 0)
    assert programs(once) == 1

    train(arm, 0)
    train(arm, 1)
    assert programs(arm.step) == 1
    state = arm.init(jax.random.key(0))
    (batch,) = train_batches(split, tiny, 0, last_step=1)
    arm.step(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_metrics_are_fetched_one_step_late(tiny, split):
    arm = compile_arm(tiny, split, 0)
    events = []
    numbers = itertools.count(1)

    def step(state, batch):
        events.append(("dispatched", next(numbers)))
        return arm.step(state, batch)

    class Seeing(Hooks):
        def on_step(self, step, loss, learning_rate):
            events.append(("seen", step))

    train(dataclasses.replace(arm, step=step), 0, Seeing())
    expected = [("dispatched", 1)]
    for number in range(2, 13):
        expected.append(("dispatched", number))
        if number % 3 != 1:  # but an epoch's last ones before it is scored
            expected.append(("seen", number - 1))
        if number % 3 == 0:
            expected.append(("seen", number))
    assert events == expected


def test_reports_are_means_of_the_steps(tiny, split):
    recorder = Recorder()
    arm = compile_arm(tiny, split, 1)
    train(arm, 0, recorder)
    steps, losses, rates = (
        np.array(column) for column in zip(*recorder.steps, strict=True)
    )
    np.testing.assert_array_equal(steps, np.arange(1, 13))
    np.testing.assert_allclose(rates, arm.learning_rates, rtol=1e-6)
    assert [report.epoch for report in recorder.reports] == [1, 2, 3, 4]
    np.testing.assert_allclose(
        [report.batch_loss for report in recorder.reports],
        losses.reshape(4, 3).mean(axis=1),
        rtol=1e-6,
    )
    for number, report in enumerate(recorder.reports):
        assert report.learning_rate == pytest.approx(rates[3 * number + 2])
        assert report.examples_per_second > 0


def test_training_learns(tiny, split):
    """Twenty random labels: chance is a loss of log 10; memory goes far below."""
    config = override(tiny, epochs=200)
    recorder = Recorder()
    train(compile_arm(config, split, 0), 0, recorder)
    assert recorder.reports[0].batch_loss > 1.5
    assert recorder.reports[-1].batch_loss < 1.0


def test_seed_decides_everything(tiny, split):
    arm, other_arm = compile_arm(tiny, split, 0), compile_arm(tiny, split, 3)
    start, same, different = (
        a.init(jax.random.key(seed)).params
        for a, seed in ((arm, 0), (other_arm, 0), (arm, 1))
    )
    chex.assert_trees_all_equal(start, same)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(start, different)
    first, again, other = (train(arm, seed).params for seed in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(first, other, rtol=1e-3)


def test_nonfinite_loss_names_the_step(tiny, split):
    arm = compile_arm(tiny, split, 0)
    numbers = itertools.count(1)

    def step(state, batch):
        loss = jnp.asarray(jnp.nan if next(numbers) == 5 else 1.0)
        return state, Metrics(loss, jnp.zeros([]))

    recorder = Recorder()
    with pytest.raises(
        FloatingPointError,
        match=r"loss is nan at step 5 \(epoch 2 of 4, arm sgd, .*--learning-rate",
    ):
        train(dataclasses.replace(arm, step=step), 0, recorder)
    assert [step for step, *_ in recorder.steps] == [1, 2, 3, 4]


PARTS = {
    "a weight": lambda state: state._replace(params=spoil(state.params)),
    "a BatchNorm statistic": lambda state: state._replace(
        batch_stats=spoil(state.batch_stats)
    ),
    "an average": lambda state: with_average(state, num_averaged=1),
}


def spoil(tree):
    """Make the last entry of the last leaf infinite."""
    *leaves, last = jax.tree.leaves(tree)
    spoilt = last.ravel().at[-1].set(jnp.inf).reshape(last.shape)
    return jax.tree.unflatten(jax.tree.structure(tree), [*leaves, spoilt])


def with_average(state, num_averaged):
    *others, average = state.opt_state
    average = average._replace(
        num_averaged=jnp.int32(num_averaged), avg_params=spoil(average.avg_params)
    )
    return state._replace(opt_state=(*others, average))


def spoiling(arm, spoilt, at):
    """The arm with a step that does nothing, but for one that spoils the state."""
    numbers = itertools.count(1)

    def step(state, batch):
        state = spoilt(state) if next(numbers) == at else state
        return state, Metrics(jnp.ones([]), jnp.zeros([]))

    return dataclasses.replace(arm, step=step)


@pytest.mark.parametrize("what", PARTS)
def test_state_is_checked_before_an_epoch_ends(tiny, split, what):
    """The loss of the epoch's last step does not show what its update did."""
    arm = spoiling(compile_arm(tiny, split, 3), PARTS[what], at=6)
    recorder = Recorder()
    message = (
        rf"{what} is not finite at step 6 \(epoch 2 of 4, arm swa3, learning rate "
    )
    with pytest.raises(FloatingPointError, match=message):
        train(arm, 0, recorder)
    assert [epoch for epoch, _ in recorder.ends] == [1]


@pytest.mark.parametrize("what", PARTS)
def test_state_is_checked_before_it_is_saved(tiny, split, what):
    class Saving(Hooks):
        def after_step(self, step, snapshot):
            snapshot()
            raise AssertionError("saved")

    arm = spoiling(compile_arm(tiny, split, 3), PARTS[what], at=1)
    with pytest.raises(FloatingPointError, match=f"{what} is not finite at step 1 "):
        train(arm, 0, Saving())


def test_average_means_nothing_before_its_first_sample(tiny, split):
    arm = compile_arm(tiny, split, 3)
    train(spoiling(arm, lambda s: with_average(s, num_averaged=0), 6), 0)


def test_only_floating_leaves_can_be_infinite():
    odd = {"count": jnp.arange(3), "key": jax.random.key(0), "none": None}
    assert all(_finite(odd, {}, None).values())
    nan = jnp.array([1, jnp.nan], jnp.bfloat16)
    assert _finite({**odd, "w": nan}, {}, None) == {
        "a weight": False,
        "a BatchNorm statistic": True,
    }


def test_snapshots_keep_the_metrics_of_their_moment(tiny, split):
    snapshots = []

    class Saving(Hooks):
        def after_step(self, step, snapshot):
            snapshots.append(snapshot())

    train(compile_arm(tiny, split, 0), 0, Saving())
    found = [(s.step, len(s.metrics)) for s in snapshots]
    assert found == [(step, step % 3) for step in range(1, 13)]


def test_divergence_is_noticed(tiny, split):
    config = override(tiny, learning_rate=1e30, swa_lr=1e30)
    with pytest.raises(FloatingPointError, match=r"at step \d+ .* arm swa3"):
        train(compile_arm(config, split, 3), 0)
