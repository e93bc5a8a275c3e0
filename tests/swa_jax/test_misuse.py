"""What nobody meant people to do to an average: it works, or the message says why not.

``transformations.METHODS`` says which averages; the strictest settings of JAX, other
frameworks' containers, and arguments in the wrong place.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax import export

import swa_jax

from .transformations import (
    METHODS,
    Case,
    bits,
    counters,
    every_method,
    gradient,
    make_step,
    model,
    train,
    trees,
)

#: The default run takes two cases of each test here, see conftest.py.
pytestmark = pytest.mark.sample(2)

# JAX at its strictest. (Rank promotion raises in all tests, see conftest.py.)


@contextlib.contextmanager
def strictest(jit):
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.debug_nans(True))
        stack.enter_context(jax.numpy_dtype_promotion("strict"))
        stack.enter_context(jax.disable_jit(not jit))
        yield


@pytest.mark.slow
@every_method
@pytest.mark.parametrize("jit", [False, True], ids=["disable_jit", "jit"])
def test_under_the_strictest_settings(case, jit):
    params = {"w": jnp.ones((2, 2)), "h": jnp.ones(3, jnp.bfloat16)}
    case = Case(case.method, {"start_step": 2, "skip_nonfinite": True})
    average, history = case.make(), []
    with strictest(jit):
        state, loop = average.init(params), swa_jax.init_average(params, average)
        update = jax.jit(average.update)
        for t in range(4):
            updates = jax.tree.map(lambda x, t=t: jnp.full_like(x, t), params)
            _, state = update(updates, state, params)
            params = optax.apply_updates(params, updates)
            history.append(jax.device_get(params))
            loop = swa_jax.update_average(loop, params, average)
        read = [case.read(each, params) for each in (state, loop)]
    for each in read:
        case.assert_average(each, history)


@every_method
def test_shapes_alone(case):
    def run(params):
        opt_state = tx.init(params)
        params, opt_state = make_step(tx)(params, opt_state, 0.0)
        return case.read(opt_state, params)

    tx = optax.chain(optax.sgd(0.1), case.make())
    expected = jax.eval_shape(model)
    read = jax.eval_shape(case.read, jax.eval_shape(tx.init, expected), expected)
    assert read == jax.eval_shape(run, expected) == expected


@every_method
def test_export(case):
    tx = optax.chain(optax.sgd(0.1), case.make())
    params, opt_state, _ = train(tx, model(), 2)
    leaves, treedef = jax.tree.flatten(opt_state)

    def step(params, leaves, t):
        # Of classes, which no file can hold.
        opt_state = jax.tree.unflatten(treedef, leaves)
        params, opt_state = make_step(tx)(params, opt_state, t)
        return params, jax.tree.leaves(opt_state)

    arguments = (params, leaves, jnp.float32(2))
    exported = export.export(jax.jit(step), platforms=("cpu", "tpu"))(*arguments)
    again = export.deserialize(exported.serialize())
    assert bits(again.call(*arguments)) == bits(jax.jit(step)(*arguments))


# Frameworks.


@every_method
def test_linen_train_state(case):
    network = nn.Dense(2)
    params = network.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    tx = optax.chain(optax.adam(0.1), case.make())
    state = TrainState.create(apply_fn=network.apply, params=params, tx=tx)
    step, history = jax.jit(lambda s, g: s.apply_gradients(grads=g)), []
    for t in range(6):
        state = step(state, gradient(state.params, jnp.float32(t)))
        history.append(jax.device_get(state.params))
    which = case.method.state
    for opt_state in (state, state.opt_state):
        found = swa_jax.average_state(opt_state, which)
        assert type(found) is which
        for name in (None, which):
            average = swa_jax.averaged_params(opt_state, state.params, name)
            case.assert_average(average, history)
    moved = swa_jax.with_num_updates(state, 9, which)
    assert tuple(map(int, counters(swa_jax.average_state(moved, which)))) == (9, 2)


@every_method
def test_nnx_optimizer(case):
    network = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    tx = optax.chain(optax.adam(0.1), case.make())
    optimizer = nnx.Optimizer(network, tx, wrt=nnx.Param)

    @nnx.jit
    def step(network, optimizer, x):
        loss = lambda network: jnp.mean((network(x) - 1) ** 2)  # noqa: E731
        optimizer.update(network, nnx.grad(loss)(network))

    pure = lambda: nnx.state(network, nnx.Param)  # noqa: E731
    history = []
    for t in range(6):
        step(network, optimizer, jnp.sin(t + jnp.arange(12.0).reshape(4, 3)))
        history.append(jax.device_get(nnx.to_pure_dict(pure())))
    state = swa_jax.average_state(optimizer, case.method.state)
    assert type(state) is case.method.state
    for counter in counters(state):
        assert isinstance(counter, jax.Array)
    graphdef, everything = nnx.split((network, optimizer))

    @jax.jit
    def read(everything):
        network, optimizer = nnx.merge(graphdef, everything)
        return case.read(optimizer, nnx.state(network, nnx.Param))

    outside = (case.read(each, pure()) for each in (optimizer, optimizer.opt_state))
    for average in (read(everything), *outside):
        case.assert_average(nnx.to_pure_dict(average), history)
    # And back into the model, from a loop too.
    average = case.make()
    loop = swa_jax.init_average(pure(), average)
    for _ in range(3):
        loop = swa_jax.update_average(loop, pure(), average)
    nnx.update(network, case.read(loop, pure()))
    assert bits(nnx.to_pure_dict(pure())) == bits(history[-1])


# Several at once.


def several():
    """All methods, each under its name, and the weights of every step."""
    cases = {name: Case(method) for name, method in METHODS.items()}
    links = ((name, case.make()) for name, case in cases.items())
    tx = optax.named_chain(("sgd", optax.sgd(0.1)), *links)
    return cases, *train(tx, model(), 4)


def test_each_of_several_by_name_and_by_type():
    cases, params, opt_state, history = several()
    read = jax.jit(
        lambda opt_state: {
            name: swa_jax.averaged_params(opt_state, params, name) for name in cases
        }
    )
    for name, average in read(opt_state).items():
        cases[name].assert_average(average, history)
        assert type(swa_jax.average_state(opt_state, name)) in (
            cases[name].method.state,
            swa_jax.SWAState,  # within the compensated one
        )
        moved = swa_jax.with_num_updates(opt_state, 9, name)
        seen = {
            other: int(swa_jax.average_state(moved, other).num_updates)
            for other in cases
        }
        assert seen == {other: 9 if other == name else 4 for other in cases}
    for state in (swa_jax.LAWAState, swa_jax.SWAGState, swa_jax.PowerEMAState):
        assert type(swa_jax.average_state(opt_state, state)) is state


def test_which_of_several_is_meant():
    _, params, opt_state, _ = several()
    total = len(METHODS)
    with pytest.raises(
        ValueError,
        match=rf"holds {total} averages.*SWAState at opt_state\['swa'\], .*\['compens.*"
        rf"and {total - 3} more; name the one",
    ):
        swa_jax.averaged_params(opt_state, params)
    with pytest.raises(ValueError, match=r"2 EMAStates.*\['ema'\], .*\['ema_warmup'\]"):
        swa_jax.averaged_params(opt_state, params, swa_jax.EMAState)
    with pytest.raises(ValueError, match=r"no average named 'slow', only .*\['lawa'\]"):
        swa_jax.averaged_params(opt_state, params, "slow")
    for which in (3, swa_jax.ema, swa_jax.lawa(2), ("lawa",)):
        with pytest.raises(TypeError, match=r"which must be the type of an average"):
            swa_jax.averaged_params(opt_state, params, which)  # type: ignore[arg-type]


# In a wrong place.


PARAMS = {"w": jnp.ones(2), "b": jnp.ones(3)}


def wrong_calls(average, state):
    """Each with the error it makes, none of which may donate the state."""
    update, init = swa_jax.update_average, swa_jax.init_average
    other = swa_jax.swag(9) if average.plan.caller == "lawa" else swa_jax.lawa(9)
    chain = optax.chain(optax.sgd(0.1), average)
    return {
        "swapped": (lambda: update(PARAMS, state, average), "state must be"),
        "average first": (lambda: update(average, state, PARAMS), "average must be"),
        "swapped init": (lambda: init(average, PARAMS), "average must be"),
        "sample third": (lambda: update(state, PARAMS, True), "average must be"),
        "a chain": (lambda: update(state, PARAMS, chain), "chain around it"),
        "init of a chain": (lambda: init(PARAMS, chain), "chain around it"),
        "masked": (lambda: init(PARAMS, optax.masked(average, True)), "around it"),
        "a factory": (lambda: init(PARAMS, swa_jax.ema), "average must be"),
        "chain's state": (
            lambda: update(chain.init(PARAMS), PARAMS, average),
            "state must be",
        ),
        "another's state": (
            lambda: update(init(PARAMS, other), PARAMS, average),
            "pass the average and the state that belong together",
        ),
        "another's update": (
            lambda: average.update(PARAMS, init(PARAMS, other), PARAMS),
            "state must be",
        ),
        "part": (lambda: update(state, {"w": jnp.ones(2)}, average), "structure"),
        "shape": (
            lambda: update(state, {**PARAMS, "b": jnp.ones(2)}, average),
            r"params\['b'\] has shape \(2,\).*\(3,\)",
        ),
        "dtype": (
            lambda: update(state, {**PARAMS, "b": jnp.arange(3)}, average),
            r"params\['b'\] has dtype int32",
        ),
        "read swapped": (
            lambda: swa_jax.averaged_params(PARAMS, state),
            "they were swapped",
        ),
        "options twice": (
            lambda: init(PARAMS, average, accumulator_dtype=jnp.float32),
            "next to an average",
        ),
    }


@every_method
def test_arguments_in_a_wrong_place(case):
    average = Case(case.method).make()
    state = swa_jax.init_average(PARAMS, average)
    for call, message in wrong_calls(average, state).values():
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    state = swa_jax.update_average(state, PARAMS, average)  # nothing was donated
    assert bits(case.read(state, PARAMS)) == bits(PARAMS)


@pytest.mark.parametrize(
    ("make", "old", "new"),
    [
        (swa_jax.lawa, 3, 5),
        (swa_jax.lawa, 5, 3),
        (swa_jax.swag, 3, 5),
        (swa_jax.swag, 5, 0),
        (swa_jax.swag, 0, 5),
    ],
)
def test_a_stack_of_another_size(make, old, new):
    # It would be written past its end, where nothing is kept, or not to its end.
    state = swa_jax.init_average(PARAMS, make(old))
    name = make.__name__
    message = rf"state was made for {name}\({old}\), the average is {name}\({new}\)"
    for call in (
        lambda: swa_jax.update_average(state, PARAMS, make(new)),
        lambda: jax.jit(make(new).update)(PARAMS, state, PARAMS),
        lambda: optax.chain(make(new)).update(PARAMS, (state,), PARAMS),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    swa_jax.update_average(state, PARAMS, make(old))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: swa_jax.ema(100, 0.9),  # type: ignore[arg-type]
            r"decay must be in \[0, 1\), got 100",
        ),
        (lambda: swa_jax.ema(1.0), r"the plain mean of all is swa\(\)"),
        (lambda: swa_jax.ema(np.nan), r"decay must be in"),
        (
            lambda: swa_jax.ema("0.9"),  # type: ignore[arg-type]
            r"decay must be a number",
        ),
        (lambda: swa_jax.ema(jnp.full(2, 0.9)), r"an array of shape \(2,\)"),
        (
            lambda: swa_jax.ema(0.9, 0.5),  # type: ignore[arg-type]
            r"start_step must be an integer",
        ),
        (lambda: swa_jax.ema(0.9, 1, 0), r"period must be at least 1"),
        (lambda: swa_jax.ema_warmup(0.9, min_decay=0.95), r"min_decay must be in"),
        (lambda: swa_jax.ema_warmup(10), r"decay must be in"),
        (lambda: swa_jax.ema_warmup(0.9, power=0), r"power must be in \(0, inf\)"),
        (lambda: swa_jax.power_ema(0.3), r"sigma_rel must be in \(0, 0.288"),
        (lambda: swa_jax.power_ema(gamma=-1), r"gamma must be in \(-1, inf\)"),
        (lambda: swa_jax.lawa(0), r"window must be at least 1"),
        (
            lambda: swa_jax.lawa(2.0),  # type: ignore[arg-type]
            r"window must be an integer",
        ),
        (lambda: swa_jax.lawa(True), r"window must be an integer"),
        (lambda: jax.jit(swa_jax.lawa)(3), r"window must be an integer known outside"),
        (lambda: swa_jax.swag(-1), r"rank must be at least 0"),
    ],
    ids=lambda value: value[:18] if isinstance(value, str) else "",
)
def test_refused_arguments(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


# Hyperparameters inside a trace.


def run_of(make, numbers):
    """The average of 1, 2, 4, 8 with hyperparameters as they come."""
    average = make(numbers)
    state = swa_jax.init_average(jnp.ones(2), average)
    for x in (1.0, 2.0, 4.0, 8.0):
        state = swa_jax.averaged_with(state, jnp.full(2, x), average)
    return state.avg_params[0]


TRACED = {
    "ema": (lambda d: swa_jax.ema(d), 0.7),
    "plain": (lambda d: swa_jax.ema(d, debias=False), 0.7),
    "function": (lambda d: swa_jax.ema(lambda n: d), 0.7),
    "power_ema": (lambda g: swa_jax.power_ema(gamma=g), 2.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRACED)
def test_traced_hyperparameters(name):
    make, value = TRACED[name]
    run = functools.partial(run_of, make)
    expected = run(value)
    # Float32 and a decay rounded to it: eight roundings of numbers up to 8.
    rtol = 16 * 2.0**-24
    traced = jax.jit(run)
    np.testing.assert_allclose(traced(value), expected, rtol=rtol)
    np.testing.assert_allclose(traced(value / 2), run(value / 2), rtol=rtol)
    many = jax.vmap(run)(jnp.array([value, value / 2]))
    np.testing.assert_allclose(many, [expected, run(value / 2)], rtol=rtol)
    # By central differences in float64, of an error of h**2 = 1e-8.
    h = 1e-4
    with jax.enable_x64(True):
        slope = (run(value + h) - run(value - h)) / (2 * h)
    np.testing.assert_allclose(jax.grad(run)(value), slope, rtol=1e-3)


@pytest.mark.parametrize("name", ["ema", "power_ema"])
def test_injected_hyperparameters_may_follow_a_schedule(name):
    makes: dict[str, tuple[Callable[..., Any], str, float]] = {
        "ema": (swa_jax.ema, "decay", 0.7),
        "power_ema": (swa_jax.power_ema, "gamma", 2.5),
    }
    make, argument, value = makes[name]
    for given in (value, lambda count: jnp.float32(value)):
        static = {"ema": [], "power_ema": ["sigma_rel"]}[name]
        inject = optax.inject_hyperparams(make, static_args=static)
        tx = optax.chain(optax.sgd(0.1), inject(**{argument: given}))
        params, opt_state, history = train(tx, model())
        Case(METHODS[name]).assert_run(params, opt_state, history)


@pytest.mark.parametrize("name", ["lawa", "swag"])
def test_seeds_with_starts_of_their_own(name):
    # Each of them has a stack of its own, filled as far as it came.
    case = Case(METHODS[name])

    def run(start, models):
        average = case.method.make(**case.method.arguments, start_step=start)
        state = swa_jax.init_average(models[0], average)

        def step(state, model):
            return swa_jax.averaged_with(state, model, average), None

        return jax.lax.scan(step, state, models)[0]

    models = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)
    states = jax.jit(jax.vmap(run, (0, None)))(jnp.array([1, 3, 5]), models)
    np.testing.assert_array_equal(states.num_averaged, [5, 3, 1])
    averages = case.read(states, jnp.zeros((3, 4)))
    for start, average in zip((1, 3, 5), averages, strict=True):
        Case(case.method, {"start_step": start}).assert_average(average, list(models))
    assert {leaf.shape[0] for leaf in jax.tree.leaves(trees(states))} == {3}
