"""``swa()`` among the other transformations: whatever optax can wrap, combine or run.

Oracles are NumPy float64 means of the weights that the training loop stored. Most runs
move by multiples of 1/8 so that float32 is exact; where they are not, tolerances are
in U, float32's half ulp, times the largest weight and the number of models / 2.
"""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import swa_jax
from swa_jax.averaging import accumulate

from ..compiled import assert_in_place, bytes_per_device, memory

U = 2.0**-24


def bits(tree) -> list[bytes]:
    """The exact content of every leaf."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def types(tree) -> list:
    """Everything about a tree that would make jit compile anew."""
    leaves, treedef = jax.tree.flatten(tree)
    return [treedef, *map(jax.typeof, leaves)]


def model() -> dict[str, Any]:
    """Fresh parameters of a small network."""
    rng = np.random.default_rng(0)
    return {
        "encoder": {
            "w": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
            "b": jnp.zeros(3),
        },
        "head": {"w": jnp.asarray(rng.normal(size=(3,)), jnp.float32)},
    }


def gradient(params, t):
    """Of a loss that changes with every batch."""

    def one(w):
        noise = jnp.sin(t + jnp.arange(w.size)).reshape(w.shape)
        return 0.5 * w + noise.astype(w.dtype)

    return jax.tree.map(one, params)


def train(tx, params, steps: int, **extra):
    """The states and the stored weights of every step, from one compiled step."""

    @jax.jit
    def step(params, opt_state, t):
        grads = gradient(params, t)
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    history = []
    for t in range(steps):
        params, opt_state = step(params, opt_state, jnp.float32(t))
        history.append(jax.device_get(params))
    assert step._cache_size() == 1  # compiled once for all steps
    return params, opt_state, history


def assert_mean(average, models) -> None:
    """Compares with the float64 mean."""
    chex.assert_trees_all_equal_shapes(average, models[0])

    def check(got, *stacked):
        stacked = np.stack(stacked).astype(np.float64)
        np.testing.assert_allclose(
            np.asarray(got, np.float64),
            stacked.mean(0),
            rtol=0,
            atol=U * np.abs(stacked).max() * (len(stacked) / 2 + 5),
        )

    jax.tree.map(check, average, *models)


# Combining and wrapping.


@pytest.mark.parametrize(
    "make",
    [
        lambda swa: optax.chain(optax.sgd(0.1), swa),
        lambda swa: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2), swa),
        lambda swa: optax.chain(optax.chain(optax.lion(1e-2), optax.chain(swa))),
        lambda swa: optax.named_chain(("sgd", optax.sgd(0.1)), ("swa", swa)),
        lambda swa: optax.apply_if_finite(optax.chain(optax.sgd(0.1), swa), 3),
        lambda swa: optax.with_extra_args_support(optax.chain(optax.sgd(0.1), swa)),
        lambda swa: optax.chain(optax.flatten(optax.adam(0.1)), swa),
        lambda swa: optax.chain(optax.adafactor(1e-2), swa),
        lambda swa: optax.conditionally_transform(
            optax.chain(optax.sgd(0.1), swa), lambda step: step >= 0
        ),
    ],
    ids=[
        "chain",
        "adamw",
        "nested",
        "named_chain",
        "apply_if_finite",
        "extra_args_support",
        "flatten",
        "adafactor",
        "conditionally_transform",
    ],
)
def test_inside(make):
    tx = make(swa_jax.swa(start_step=3, period=2))
    params, opt_state, history = train(tx, model(), 8)
    state = swa_jax.swa_state(opt_state)
    assert (int(state.num_updates), int(state.num_averaged)) == (8, 3)
    averaged = [history[t - 1] for t in (3, 5, 7)]
    assert_mean(swa_jax.swa_params(opt_state, params), averaged)
    assert_mean(jax.jit(swa_jax.swa_params)(opt_state, params), averaged)


def test_extra_arguments_reach_the_others():
    def update(updates, state, params=None, *, scale, **extra_args):
        del params, extra_args
        return jax.tree.map(lambda g: scale * g, updates), state

    scaled = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )
    tx = optax.chain(optax.sgd(0.1), scaled, swa_jax.swa())
    params = {"w": jnp.ones(2)}
    _, state = tx.update(params, tx.init(params), params, scale=jnp.float32(5), loss=1)
    np.testing.assert_array_equal(state[-1].avg_params["w"], [0.5, 0.5])


@pytest.mark.parametrize("optimizer", ["plateau", "polyak", "linesearch"])
def test_beside_optimizers_that_need_extra_arguments(optimizer):
    def loss_fn(params):
        return jnp.sum((params - 3.0) ** 2)

    before = {
        "plateau": optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
        "polyak": optax.polyak_sgd(),
        "linesearch": optax.lbfgs(linesearch=optax.scale_by_backtracking_linesearch(9)),
    }[optimizer]
    tx = optax.chain(before, swa_jax.swa(2))
    params = jnp.zeros(3)
    opt_state = tx.init(params)
    history = []

    @jax.jit
    def step(params, opt_state):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(
            grads, opt_state, params, value=loss, grad=grads, value_fn=loss_fn
        )
        return optax.apply_updates(params, updates), opt_state

    for _ in range(4):
        params, opt_state = step(params, opt_state)
        history.append(np.asarray(params))
    assert_mean(swa_jax.swa_params(opt_state, params), history[1:])


def test_apply_if_finite_with_a_nan_gradient():
    # The wrapper undoes the whole inner step: it is no update, and is not averaged.
    tx = optax.apply_if_finite(optax.chain(optax.sgd(1.0), swa_jax.swa()), 5)
    params = {"w": jnp.zeros(2)}
    opt_state = tx.init(params)
    for value in (1.0, np.nan, 2.0, np.inf, 3.0):
        grads = {"w": jnp.full(2, -value)}
        updates, opt_state = jax.jit(tx.update)(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    state = swa_jax.swa_state(opt_state)
    assert int(state.num_updates) == int(state.num_averaged) == 3
    # Weights 1, 3 and 6, whose mean needs one rounding.
    average = swa_jax.swa_params(opt_state, params)["w"]
    np.testing.assert_allclose(average, [10 / 3] * 2, rtol=4 * U)
    chex.assert_tree_all_finite(average)


def accumulated(tx, gradients):
    """The weights after every mini-batch, and the last state."""
    params = {"w": jnp.zeros(2)}
    opt_state, history = tx.init(params), []
    update = jax.jit(tx.update)
    for value in gradients:
        updates, opt_state = update({"w": jnp.full(2, -value)}, opt_state, params)
        params = optax.apply_updates(params, updates)
        history.append(float(params["w"][0]))
    return history, opt_state, params


# Twelve mini-batches in fours: mean gradients 1, 2 and 6, weights 1, 3 and 9.
MINI_BATCHES = (1, 1, 1, 1, 0, 4, 2, 2, 6, 6, 12, 0)


def test_inside_multi_steps_counts_optimizer_steps():
    tx = optax.MultiSteps(
        optax.chain(optax.sgd(1.0), swa_jax.swa(start_step=2)), every_k_schedule=4
    )
    history, opt_state, params = accumulated(tx, MINI_BATCHES)
    assert history[3::4] == [1.0, 3.0, 9.0]
    state = swa_jax.swa_state(opt_state)
    assert (int(state.num_updates), int(state.num_averaged)) == (3, 2)
    average = swa_jax.swa_params(opt_state, params)["w"]
    np.testing.assert_array_equal(average, [6.0, 6.0])


def test_outside_multi_steps_counts_mini_batches():
    multi = optax.MultiSteps(optax.sgd(1.0), every_k_schedule=4)
    tx = optax.chain(
        multi.gradient_transformation(), swa_jax.swa(start_step=4, period=4)
    )
    _, opt_state, params = accumulated(tx, MINI_BATCHES)
    state = swa_jax.swa_state(opt_state)
    assert (int(state.num_updates), int(state.num_averaged)) == (12, 3)
    # Mini-batches 4, 8 and 12 end optimizer steps: 1, 3 and 9.
    average = swa_jax.swa_params(opt_state, params)["w"]
    np.testing.assert_allclose(average, [13 / 3] * 2, rtol=4 * U)


FROZEN = {"encoder": {"w": False, "b": True}, "head": {"w": True}}


def test_inside_masked():
    trained = optax.chain(optax.sgd(0.1), swa_jax.swa(start_step=2))
    tx = optax.chain(
        optax.masked(optax.set_to_zero(), jax.tree.map(lambda x: not x, FROZEN)),
        optax.masked(trained, FROZEN),
    )
    start = model()
    params, opt_state, history = train(tx, start, 5)
    hidden = swa_jax.swa_state(opt_state).avg_params["encoder"]["w"]
    assert isinstance(hidden, optax.MaskedNode)
    average = swa_jax.swa_params(opt_state, params)
    frozen = [tree["encoder"]["w"] for tree in (average, params, start)]
    assert bits(frozen[0]) == bits(frozen[1]) == bits(frozen[2])
    visible = lambda tree: {**tree, "encoder": tree["encoder"]["b"]}  # noqa: E731
    assert_mean(visible(average), [visible(models) for models in history[1:]])


def test_masked_subtree():
    # A mask may be a prefix of the parameters: it hides a whole subtree at once.
    tx = optax.masked(swa_jax.swa(), {"encoder": False, "head": True})
    params = model()
    updates = jax.tree.map(jnp.ones_like, params)
    _, opt_state = jax.jit(tx.update)(updates, tx.init(params), params)
    for read in (swa_jax.swa_params, jax.jit(swa_jax.swa_params)):
        average = read(opt_state, params)
        chex.assert_trees_all_equal(average["encoder"], params["encoder"])
        expected = jax.tree.map(lambda x: x + 1, params["head"])
        chex.assert_trees_all_equal(average["head"], expected)


def test_around_masked():
    # Freezing inside, averaging outside: frozen weights average to themselves.
    tx = optax.chain(
        optax.masked(optax.sgd(0.1), FROZEN),
        optax.masked(optax.set_to_zero(), jax.tree.map(lambda x: not x, FROZEN)),
        swa_jax.swa(start_step=2),
    )
    params, opt_state, history = train(tx, model(), 5)
    average = swa_jax.swa_params(opt_state, params)
    assert bits(average["encoder"]["w"]) == bits(params["encoder"]["w"])
    assert_mean(average, history[1:])


def partition(groups):
    """``optax.partition``, or its name in older releases."""
    make = getattr(optax, "partition", None) or optax.multi_transform
    return make(groups, {"encoder": "slow", "head": "fast"})


def test_inside_one_group_of_a_partition():
    tx = partition(
        {
            "slow": optax.sgd(0.01),
            "fast": optax.chain(optax.sgd(0.1), swa_jax.swa(start_step=2)),
        }
    )
    params, opt_state, history = train(tx, model(), 5)
    average = swa_jax.swa_params(opt_state, params)
    assert bits(average["encoder"]["w"]) == bits(params["encoder"]["w"])
    assert_mean(average["head"], [models["head"] for models in history[1:]])


def test_around_a_partition():
    tx = optax.chain(
        partition({"slow": optax.sgd(0.01), "fast": optax.adam(0.1)}),
        swa_jax.swa(start_step=2),
    )
    params, opt_state, history = train(tx, model(), 5)
    assert_mean(swa_jax.swa_params(opt_state, params), history[1:])


def test_inside_both_groups_of_a_partition():
    tx = partition(
        {
            "slow": optax.chain(optax.sgd(0.01), swa_jax.swa()),
            "fast": optax.chain(optax.sgd(0.1), swa_jax.swa(start_step=2)),
        }
    )
    params, opt_state, history = train(tx, model(), 4)
    with pytest.raises(ValueError, match=r"holds 2 SWAStates.*'fast'.*'slow'"):
        swa_jax.swa_params(opt_state, params)
    # "Pass the part that you mean" is advice that works.
    for group, name, first in (("slow", "encoder", 0), ("fast", "head", 1)):
        average = swa_jax.swa_params(opt_state.inner_states[group], params)
        assert_mean(average[name], [models[name] for models in history[first:]])


# Hyperparameters as arrays.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_inject_hyperparams_is_the_same_average(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), model())
    runs = []
    for swa in (swa_jax.swa, optax.inject_hyperparams(swa_jax.swa)):
        tx = optax.chain(optax.sgd(0.125), swa(start_step=3, period=2, stop_step=7))
        final, opt_state, _ = train(tx, params, 9)
        state = swa_jax.swa_state(opt_state)
        assert int(state.num_averaged) == 3
        runs.append((final, state, swa_jax.swa_params(opt_state, final)))
    chex.assert_trees_all_close(*runs, rtol=4 * U)
    assert types(runs[0]) == types(runs[1])


def test_inject_hyperparams_keeps_large_steps_exact():
    # As float32 they would be rounded to an even number, in bfloat16 to 2^24.
    start = 2**24 + 1
    tx = optax.inject_hyperparams(swa_jax.swa)(start_step=start, period=start)
    params = jnp.zeros(2, jnp.bfloat16)
    opt_state = tx.init(params)
    for t, count in ((start - 1, 0), (start, 1), (start + 1, 0)):
        inner = opt_state.inner_state._replace(num_updates=jnp.int32(t - 1))
        _, new = jax.jit(tx.update)(
            params, opt_state._replace(inner_state=inner), params
        )
        assert int(swa_jax.swa_state(new).num_averaged) == count


def test_inject_hyperparams_with_every_option():
    make = optax.inject_hyperparams(
        swa_jax.swa, static_args=("accumulator_dtype", "skip_nonfinite", "sharding")
    )
    tx = make(2, accumulator_dtype=jnp.float16, skip_nonfinite=True)
    _, opt_state, _ = train(tx, {"w": jnp.zeros(2)}, 3)
    assert swa_jax.swa_state(opt_state).avg_params["w"].dtype == jnp.float16
    assert int(swa_jax.swa_state(opt_state).num_averaged) == 2


def test_inject_hyperparams_around_the_whole_optimizer():
    @optax.inject_hyperparams
    def make(learning_rate, start_step):
        return optax.chain(optax.sgd(learning_rate), swa_jax.swa(start_step))

    schedule = optax.piecewise_constant_schedule(0.5, {2: 0.5})
    tx = make(learning_rate=schedule, start_step=2)
    params, opt_state, history = train(tx, model(), 5)
    assert_mean(swa_jax.swa_params(opt_state, params), history[1:])


# Dtypes and types.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_weights_enter_as_they_are_stored(dtype):
    # Inside one compiled step XLA may keep sums in float32 ("excess precision"): the
    # mean must still be that of the rounded weights. One model, so bit for bit.
    params = jnp.linspace(-3, 3, 4096).astype(dtype)
    tx = optax.chain(optax.sgd(0.1), swa_jax.swa())
    params, opt_state, _ = train(tx, params, 1)
    average = swa_jax.swa_state(opt_state).avg_params
    assert average.dtype == jnp.float32
    assert bits(average) == bits(params.astype(jnp.float32))


def test_bfloat16_parameters():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model())
    tx = optax.chain(optax.sgd(0.1), swa_jax.swa(start_step=2))
    params, opt_state, history = train(tx, params, 9)
    state = swa_jax.swa_state(opt_state)
    assert {x.dtype for x in jax.tree.leaves(state.avg_params)} == {
        jnp.dtype("float32")
    }
    assert_mean(state.avg_params, history[1:])
    average = swa_jax.swa_params(opt_state, params)
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.avg_params)
    assert bits(average) == bits(expected)


@pytest.mark.parametrize("init", ["eager", "jit"])
def test_types_are_stable(init):
    params = {
        "weak": jnp.asarray(1.0),
        "bf16": jnp.ones(2, jnp.bfloat16),
        "f32": jnp.ones((2, 2)),
        "int": jnp.arange(3),
        "complex": jnp.ones(2, jnp.complex64),
    }
    tx = swa_jax.swa(2, skip_nonfinite=True)
    state = (jax.jit(tx.init) if init == "jit" else tx.init)(params)
    expected = types(state)
    for update in (tx.update, jax.jit(tx.update)):
        for _ in range(2):
            updates = jax.tree.map(jnp.ones_like, params)
            out, state = update(updates, state, params)
            assert types(state) == expected
            assert types(out) == types(updates)


def test_one_trace_for_weakly_typed_parameters():
    # As in a notebook: the first parameters are weakly typed, stored ones are not.
    # That alone traces the caller's step twice, with swa() or without.
    params = {"scale": jnp.asarray(2.0), "shift": jnp.asarray(1.0)}
    counts = []
    for tx in (optax.sgd(0.1), optax.chain(optax.sgd(0.1), swa_jax.swa())):

        @jax.jit
        def step(params, opt_state, tx=tx):
            grads = jax.tree.map(lambda x: 0.5 * x, params)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        trained, opt_state = params, tx.init(params)
        for _ in range(5):
            trained, opt_state = step(trained, opt_state)
        counts.append(step._cache_size())
    assert counts[0] == counts[1]


@pytest.mark.parametrize("optimizer", [optax.sgd, optax.adam])
def test_one_compilation_for_many_steps(optimizer):
    tx = optax.chain(optimizer(0.1), swa_jax.swa(3, 2, stop_step=6))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state):
        updates, opt_state = tx.update(gradient(params, 1.0), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = model()
    opt_state = tx.init(params)
    for _ in range(8):
        params, opt_state = step(params, opt_state)
    assert step._cache_size() == 1
    assert int(swa_jax.swa_state(opt_state).num_averaged) == 2


# Loops.


def test_scan_is_the_python_loop():
    tx = optax.chain(optax.sgd(0.1, momentum=0.5), swa_jax.swa(3, 2))
    _, opt_state, history = train(tx, model(), 9)

    def step(carry, t):
        params, opt_state = carry
        updates, opt_state = tx.update(gradient(params, t), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def run(params, opt_state):
        return jax.lax.scan(step, (params, opt_state), jnp.arange(9.0))[0]

    params, scanned = run(model(), tx.init(model()))
    state = swa_jax.swa_state(scanned)
    assert bits(state[:2]) == bits(swa_jax.swa_state(opt_state)[:2])
    # XLA may round the loop's training otherwise, by an ulp a step.
    averaged = [history[t - 1] for t in (3, 5, 7, 9)]
    expected = jax.tree.map(lambda *x: np.mean(x, axis=0), *averaged)
    chex.assert_trees_all_close(
        swa_jax.swa_params(scanned, params), expected, rtol=0, atol=64 * U
    )


def test_vmap_over_seeds():
    tx = optax.chain(optax.sgd(0.25), swa_jax.swa(2))
    starts = jnp.arange(12.0).reshape(4, 3)
    opt_state = jax.vmap(tx.init)(starts)
    params = starts

    @jax.jit
    @jax.vmap
    def step(params, opt_state):
        updates, opt_state = tx.update(params, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(3):
        params, opt_state = step(params, opt_state)
    np.testing.assert_array_equal(swa_jax.swa_state(opt_state).num_averaged, [2] * 4)
    # Weights shrink by 3/4 a step: the mean of the second and third, exactly.
    expected = np.asarray(starts) * (0.75**2 + 0.75**3) / 2
    for read in (swa_jax.swa_params, jax.jit(jax.vmap(swa_jax.swa_params))):
        np.testing.assert_array_equal(read(opt_state, params), expected)


# Memory.


def large() -> dict[str, jax.Array]:
    """1.3 MB of parameters: counters and scalars vanish beside them."""
    return {"w": jnp.ones((512, 512)), "v": jnp.ones((512, 128)), "b": jnp.ones(7)}


def make_step(tx, gradient=jnp.sin):
    """A training step on every leaf by itself."""

    def step(params, opt_state):
        updates, opt_state = tx.update(
            jax.tree.map(gradient, params), opt_state, params
        )
        return optax.apply_updates(params, updates), opt_state

    return step


def make_scan(tx):
    """Four training steps in one call."""
    step = make_step(tx)

    def run(*carry):
        return jax.lax.scan(lambda c, _: (step(*c), None), carry, length=4)[0]

    return run


def compile_step(make, tx, *, donate=(0, 1), dtype=jnp.float32):
    """The executable, what it takes over, and the average in it."""
    params = jax.tree.map(lambda x: x.astype(dtype), large())
    opt_state = tx.init(params)
    lowered = jax.jit(make(tx), donate_argnums=donate).lower(params, opt_state)
    average = swa_jax.swa_state(opt_state).avg_params
    return lowered.compile(), (params, opt_state), average


# One program serves sampled and skipped steps: the first three take both ways.
@pytest.mark.parametrize("make", [make_step, make_scan])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"start_step": 2, "period": 3},
        {"start_step": 2, "period": 3, "stop_step": 9, "skip_nonfinite": True},
        {"accumulator_dtype": jnp.bfloat16},
    ],
    ids=["plain", "period", "skip_nonfinite", "bfloat16"],
)
def test_training_step_is_in_place(make, options):
    tx = optax.chain(optax.sgd(0.1), swa_jax.swa(**options))
    compiled, donated, average = compile_step(make, tx)
    assert_in_place(compiled, donated=donated, average=average)


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10),
    reason="the CPU compiler of older JAX copies bfloat16 weights in this step",
)
@pytest.mark.parametrize("make", [make_step, make_scan])
def test_training_step_in_bfloat16_is_in_place(make):
    # XLA used to keep the unrounded sum for the mean, and the old weights with it.
    tx = optax.chain(optax.sgd(0.1), swa_jax.swa(2, 3))
    compiled, donated, average = compile_step(make, tx, dtype=jnp.bfloat16)
    assert_in_place(compiled, donated=donated, average=average)


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_training_step_takes_no_more_than_without(optimizer):
    make = {
        "momentum": lambda: optax.sgd(0.1, momentum=0.9),
        "adamw": lambda: optax.adamw(0.1),
    }[optimizer]
    params = {"w": jnp.ones((256, 128)), "v": jnp.ones((128, 256))}
    x = jnp.ones((16, 256))

    def loss(params):
        return jnp.sum(jnp.tanh(x @ params["w"]) @ params["v"])

    found = []
    for tx in (make(), optax.chain(make(), swa_jax.swa(2, 3))):

        def step(params, opt_state, tx=tx):
            updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        jitted = jax.jit(step, donate_argnums=(0, 1))
        found.append(memory(jitted.lower(params, tx.init(params)).compile()))
    base, extended = found
    size = bytes_per_device(params)
    assert extended.temporary - base.temporary < 0.01 * size
    assert extended.copied - base.copied < 0.01 * size
    assert extended.aliased - base.aliased == size + 8  # the mean and two counters


def planted(defect: str) -> optax.GradientTransformationExtraArgs:
    """``swa(2, 3)`` as one would write it first."""

    def update(updates, state, params=None, **extra_args):
        del extra_args
        t = state.num_updates + 1
        sample = (t >= 2) & ((t - 2) % 3 == 0)
        if defect == "cond":
            new = jax.lax.cond(
                sample,
                lambda: accumulate(state, optax.apply_updates(params, updates)),
                lambda: state,
            )
        elif defect == "pre-update":
            new = accumulate(state, params, sample)
        else:
            flat, unravel = jax.flatten_util.ravel_pytree(
                jax.tree.map(
                    lambda p, u, m: jnp.asarray(optax.apply_updates(p, u), m.dtype),
                    params,
                    updates,
                    state.avg_params,
                )
            )
            mean = jax.flatten_util.ravel_pytree(state.avg_params)[0]
            mean = jnp.where(
                sample, mean + (flat - mean) / (state.num_averaged + 1), mean
            )
            new = state._replace(avg_params=unravel(mean))
        return updates, new._replace(num_updates=t)

    return optax.GradientTransformationExtraArgs(swa_jax.swa().init, update)


@pytest.mark.parametrize("make", [make_step, make_scan])
@pytest.mark.parametrize(
    ("defect", "message"),
    [
        ("cond", "large temporaries"),
        ("pre-update", "large temporaries"),
        ("concatenated", "large temporaries"),
    ],
)
def test_the_check_notices(make, defect, message):
    tx = optax.chain(optax.sgd(0.1), planted(defect))
    compiled, donated, average = compile_step(make, tx)
    with pytest.raises(AssertionError, match=message):
        assert_in_place(compiled, donated=donated, average=average)
    if defect != "concatenated":  # that one shows as a temporary only
        assert memory(compiled).copied > 0.5 * bytes_per_device(average)


@pytest.mark.parametrize("donate", [(), (0,), (1,)])
def test_the_check_notices_what_is_not_donated(donate):
    tx = optax.chain(optax.sgd(0.1), swa_jax.swa(2, 3))
    compiled, donated, average = compile_step(make_step, tx, donate=donate)
    with pytest.raises(AssertionError, match="not all in place"):
        assert_in_place(compiled, donated=donated, average=average)


@pytest.mark.parametrize("jit_init", [False, True])
def test_params_and_state_may_be_donated_together(jit_init):
    # `init` that aliased the parameters would donate one buffer twice.
    tx = optax.chain(optax.sgd(0.5), swa_jax.swa())
    step = jax.jit(make_step(tx, lambda x: jnp.full_like(x, -2)), donate_argnums=(0, 1))
    params = large()
    opt_state = (jax.jit(tx.init) if jit_init else tx.init)(params)
    for _ in range(3):
        old = (params, opt_state)
        params, opt_state = step(params, opt_state)
        assert all(x.is_deleted() for x in jax.tree.leaves(old))
    # Ones, and 1 more after each update: the mean of 2, 3 and 4.
    average = swa_jax.swa_params(opt_state, params)
    chex.assert_trees_all_equal(average, jax.tree.map(lambda x: 3 * x, large()))


def test_two_runs_from_one_state():
    # Without donation a state can be gone on from twice, as in a search.
    tx = optax.chain(optax.sgd(0.5), swa_jax.swa())
    step = jax.jit(make_step(tx))
    start = (model(), tx.init(model()))
    assert bits(step(*step(*start))) == bits(step(*step(*start)))
