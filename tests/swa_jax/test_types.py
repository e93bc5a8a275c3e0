"""What a type checker knows of results, and that it is so: mypy reads this file."""

from typing import NamedTuple, assert_type

import jax
import jax.numpy as jnp
import numpy as np
import optax

import swa_jax


class Weights(NamedTuple):
    """A tree of a type of one's own."""

    kernel: jax.Array
    bias: jax.Array


WEIGHTS = Weights(jnp.ones((2, 3)), jnp.zeros(3))


def state_of(average: optax.GradientTransformationExtraArgs) -> optax.OptState:
    tx = optax.chain(optax.sgd(0.1), average)
    state = tx.init(WEIGHTS)
    for _ in range(2):
        _, state = tx.update(WEIGHTS, state, WEIGHTS)
    return state


def test_averaged_weights_are_of_the_type_of_params():
    state = state_of(swa_jax.swa())
    assert type(assert_type(swa_jax.swa_params(state, WEIGHTS), Weights)) is Weights
    found = assert_type(swa_jax.averaged_params(state, WEIGHTS), Weights)
    assert type(found) is Weights


def test_a_sample_is_of_the_type_of_params():
    state = state_of(swa_jax.swag(2))
    key = jax.random.key(0)
    found = assert_type(swa_jax.swag_sample(key, state, WEIGHTS), Weights)
    assert type(found) is Weights


def test_soups_are_of_the_type_of_the_models():
    models = [WEIGHTS, WEIGHTS]
    assert type(assert_type(swa_jax.soup(models), Weights)) is Weights

    def evaluate(weights: Weights) -> float:
        return float(weights.kernel.sum())

    found = assert_type(swa_jax.greedy_soup(models, [1.0, 2.0], evaluate), Weights)
    assert type(found) is Weights


def test_statistics_are_of_the_type_of_statistics():
    def batch_stats_fn(params, stats, batch):
        return Moments(0.9 * stats.mean + 0.1 * batch.mean(0))

    stats = Moments(jnp.zeros(3))
    found = swa_jax.recompute_batch_stats(
        batch_stats_fn, WEIGHTS, stats, [jnp.ones((4, 3))]
    )
    assert type(assert_type(found, Moments)) is Moments


class Moments(NamedTuple):
    """BatchNorm's mean, for short without its variance."""

    mean: jax.Array


def test_a_state_that_is_asked_for_by_its_type_is_of_it():
    average = swa_jax.ema(0.9)
    state = state_of(average)
    found = assert_type(
        swa_jax.average_state(state, swa_jax.EMAState), swa_jax.EMAState
    )
    assert type(found) is swa_jax.EMAState
    moved = swa_jax.with_num_updates(found, 7)
    assert int(assert_type(moved, swa_jax.EMAState).num_updates) == 7
    found = assert_type(
        swa_jax.update_average(found, WEIGHTS, average), swa_jax.EMAState
    )
    assert type(found) is swa_jax.EMAState


def test_what_is_taken_is_what_the_types_say():
    many = [(1, 0.05, WEIGHTS), (2.0, 0.05, lambda: WEIGHTS)]
    found = swa_jax.posthoc_ema(many, sigma_rel=0.05, step=2)
    assert type(found) is Weights
    rates = swa_jax.cyclic_schedule(np.float32(0.1), jnp.float32(0), 2)
    assert float(rates(1)) == 0
    for sample in (True, np.bool_(True), np.array(True), jnp.array(True), None):
        average = swa_jax.update_average(
            swa_jax.init_average(WEIGHTS), WEIGHTS, sample=sample
        )
        assert int(average.num_averaged) == 1
