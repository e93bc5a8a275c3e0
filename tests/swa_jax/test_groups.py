"""Several optimizers and parameter groups: rates of their own, a GAN, frozen weights.

How `swa` sits in `optax.masked`, `partition` and `MultiSteps` is in the battery.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import swa_jax

U = 2.0**-24  # float32's unit roundoff

# Two groups as in PyTorch's SWALR(swa_lr=[...]): peak rate and swa_lr of each.
RATES = {"encoder": (0.4, 0.05), "head": (0.1, 0.2)}
EPOCHS, STEPS, START = 8, 3, 4


def group_rates(group: str) -> np.ndarray:
    """The rates of all steps by hand: cosine, then two linear steps to swa_lr."""
    top, swa_lr = RATES[group]
    cosine = top * (1 + np.cos(np.pi * np.arange(EPOCHS * STEPS) / 24)) / 2
    lr0 = cosine[START * STEPS]
    since = np.arange(EPOCHS * STEPS) // STEPS - START
    anneal = lr0 + (swa_lr - lr0) * np.clip(since / 2, 0, 1)
    return np.where(since < 0, cosine, anneal)


def grouped(recipe: str) -> optax.GradientTransformationExtraArgs:
    """One optimizer for both groups, with the rates above."""

    def rate(group: str) -> optax.Schedule:
        top, swa_lr = RATES[group]
        base = optax.cosine_decay_schedule(top, EPOCHS * STEPS)
        return swa_jax.swa_schedule(
            base,
            swa_lr,
            START * STEPS,
            2 * STEPS,
            strategy="linear",
            update_every=STEPS,
        )

    groups = {name: optax.sgd(rate(name)) for name in RATES}
    average = swa_jax.swa(start_step=START * STEPS, period=STEPS)
    if recipe == "around":
        return optax.chain(optax.partition(groups, {g: g for g in RATES}), average)
    inside = {name: optax.chain(tx, average) for name, tx in groups.items()}
    return optax.partition(inside, {g: g for g in RATES})


@pytest.mark.parametrize("recipe", ["around", "inside"])
def test_swa_rates_of_their_own(recipe):
    """Gradients of 1: weights are minus the sum of their group's rates."""
    tx = grouped(recipe)
    params = {name: jnp.zeros(3) for name in RATES}

    def step(carry: Any, _: Any) -> Any:
        params, opt_state = carry
        grads = jax.tree.map(jnp.ones_like, params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), params

    (params, opt_state), history = jax.lax.scan(
        step, (params, tx.init(params)), length=EPOCHS * STEPS
    )
    for name in RATES:
        weights = -np.cumsum(group_rates(name))
        # Each of 24 sums rounds once, at weights below 4; the rates a few times less.
        tolerance = 2 * EPOCHS * STEPS * U * 4
        np.testing.assert_allclose(history[name][:, 0], weights, rtol=0, atol=tolerance)
        ends = weights[STEPS - 1 :: STEPS][START - 1 :]  # of epochs 4 to 8
        part = opt_state if recipe == "around" else opt_state.inner_states[name]
        average = swa_jax.swa_params(part, params)[name]
        np.testing.assert_allclose(average, [ends.mean()] * 3, rtol=0, atol=tolerance)


class GAN(NamedTuple):
    """Two networks, each with an optimizer of its own."""

    generator: Any
    discriminator: Any
    generator_state: optax.OptState
    discriminator_state: optax.OptState


def test_two_models_with_two_optimizers():
    """A generator averaged from step 5 on, its discriminator every other step.

    Each average is of its own network, whatever order they train in; the means are
    recomputed in float64 from every weight of the run.
    """
    keys = iter(jax.random.split(jax.random.key(0), 4))
    generator = {"w": jax.random.normal(next(keys), (2, 2)), "b": jnp.zeros(2)}
    discriminator = {"w": jax.random.normal(next(keys), (2,)), "b": jnp.zeros(())}
    generator_tx = optax.chain(optax.adam(0.02), swa_jax.swa(start_step=5))
    discriminator_tx = optax.chain(optax.sgd(0.1), swa_jax.swa(start_step=4, period=2))

    def generate(params: Any, noise: jax.Array) -> jax.Array:
        return noise @ params["w"] + params["b"][None]

    def logits(params: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x) @ params["w"] + params["b"]

    def discriminator_loss(params: Any, real: jax.Array, fake: jax.Array) -> jax.Array:
        real, fake = logits(params, real), logits(params, fake)
        return jnp.mean(jax.nn.softplus(-real) + jax.nn.softplus(fake))

    def generator_loss(params: Any, discriminator: Any, noise: jax.Array) -> jax.Array:
        fake = generate(params, noise)
        return jnp.mean(jax.nn.softplus(-logits(discriminator, fake)))

    @jax.jit
    def step(gan: GAN, key: jax.Array) -> GAN:
        noise, real = jax.random.normal(key, (2, 16, 2)) + jnp.ones((1, 1, 2))
        fake = generate(gan.generator, noise)
        grads = jax.grad(discriminator_loss)(gan.discriminator, real, fake)
        updates, d_state = discriminator_tx.update(
            grads, gan.discriminator_state, gan.discriminator
        )
        discriminator = optax.apply_updates(gan.discriminator, updates)
        grads = jax.grad(generator_loss)(gan.generator, discriminator, noise)
        updates, g_state = generator_tx.update(
            grads, gan.generator_state, gan.generator
        )
        generator = optax.apply_updates(gan.generator, updates)
        return GAN(generator, discriminator, g_state, d_state)

    gan = GAN(
        generator,
        discriminator,
        generator_tx.init(generator),
        discriminator_tx.init(discriminator),
    )
    history = []
    for key in jax.random.split(next(keys), 10):
        gan = step(gan, key)
        history.append(gan)
    assert not np.array_equal(gan.generator["w"], generator["w"])
    for name, averaged in (
        ("generator", history[4:]),  # updates 5 to 10
        ("discriminator", history[3::2]),  # updates 4, 6, 8, 10
    ):
        params, opt_state = getattr(gan, name), getattr(gan, f"{name}_state")
        assert swa_jax.swa_state(opt_state).num_averaged == len(averaged)
        average = swa_jax.swa_params(opt_state, params)
        for leaf in params:
            weights = np.stack([getattr(g, name)[leaf] for g in averaged])
            mean = weights.mean(0, dtype=np.float64)
            # Three roundings an averaged model.
            atol = 3 * len(averaged) * U * np.abs(weights).max()
            np.testing.assert_allclose(average[leaf], mean, rtol=0, atol=atol)
    with pytest.raises(ValueError, match="holds 2 SWAStates"):
        swa_jax.swa_params(gan, gan.generator)  # it says to pass the part


def test_a_recipe_for_each_of_two_models():
    """The published method drives both; frozen weights are averaged to themselves."""
    recipes = {"g": swa_jax.SWA("2ep", 1, 0.1), "d": swa_jax.SWA("4ep", 1, 0.3)}
    states = {
        name: recipe.apply(
            swa_jax.Event.TRAINING_START,
            swa_jax.TrainingState(
                epoch=0,
                num_epochs=5,
                params={"w": jnp.zeros(()), "frozen": jnp.array(0.1)},
                batch_stats={},
                learning_rate=1.0,
            ),
        )
        for name, recipe in recipes.items()
    }
    for event in [swa_jax.Event.EPOCH_END] * 5 + [swa_jax.Event.TRAINING_END]:
        for name, recipe in recipes.items():
            state = states[name]
            if event is swa_jax.Event.EPOCH_END:
                params = {**state.params, "w": jnp.array(state.epoch + 1.0)}
                state = state._replace(params=params)
            if recipe.match(event, state):
                state = recipe.apply(event, state)
            states[name] = state._replace(epoch=state.epoch + 1)
    assert {k: float(s.params["w"]) for k, s in states.items()} == {"g": 3.5, "d": 4.5}
    for name, swa_lr in (("g", 0.1), ("d", 0.3)):
        assert states[name].learning_rate == np.float32(swa_lr)
        assert states[name].params["frozen"] == np.float32(0.1)
