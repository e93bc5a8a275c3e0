"""What every transformation of this library must stand, whichever average it keeps.

The list is that of optax's own parametrised tests (``contrib/_common_test.py``,
``contrib/_sharding_test.py``, ``_src/alias_test.py``, ``_src/sharding_test.py``,
``_src/float64_test.py``), and what else optax can wrap, combine or run.
``transformations.METHODS`` says what is tested. Oracles are float64 averages of the
weights that the training loop stored, with the method's weights in closed form.
"""

import contextlib
import copy
import dataclasses
import functools
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax import contrib

from ..compiled import collectives, programs
from .transformations import (
    ONE_CASE,
    Case,
    U,
    bits,
    counters,
    every_case,
    every_method,
    fields,
    gradient,
    make_step,
    model,
    shapes,
    structure,
    train,
    trees,
    types,
)

#: The default run takes two cases of each test here, see conftest.py.
pytestmark = pytest.mark.sample(2)

# Behind every optimizer.


def objective(params):
    """Rosenbrock's function and a parabola."""
    (x, y), target = params["rosenbrock"], jnp.array([[3.0, -2.0], [1.0, 4.0]])
    valley = (1 - x) ** 2 + 10 * (y - x**2) ** 2
    return valley + jnp.sum((params["parabola"] - target) ** 2)


SAM = {"adv_optimizer": optax.chain(contrib.normalize(), optax.sgd(0.01))}

#: Each as it differs from the others in what it passes on, and in what it asks for.
OPTIMIZERS = {
    "adafactor": lambda: optax.adafactor(0.05),
    "adam": lambda: optax.adam(0.05),
    "lbfgs": lambda: optax.lbfgs(
        linesearch=optax.scale_by_backtracking_linesearch(max_backtracking_steps=9)
    ),
    "noisy_sgd": lambda: optax.noisy_sgd(0.01, key=0),
    "polyak_sgd": lambda: optax.polyak_sgd(0.1),
    "mechanize": lambda: contrib.mechanize(optax.sgd(0.1)),
    "momo": lambda: contrib.momo(0.1),
    "muon": lambda: contrib.muon(0.05),
    "prodigy": lambda: contrib.prodigy(1.0),
    "reduce_on_plateau": lambda: optax.chain(
        optax.sgd(0.01), contrib.reduce_on_plateau(patience=3)
    ),
    "sam": lambda: contrib.sam(optax.sgd(0.01), **SAM, opaque_mode=True),
    "schedule_free": lambda: contrib.schedule_free(optax.sgd(0.02), 0.02),
    "sophia": lambda: contrib.sophia(0.05),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_behind(name):
    # All transformations in one chain: each passes the updates on to the next.
    cases = ONE_CASE.values()
    tx = optax.chain(OPTIMIZERS[name](), *(case.make() for case in cases))
    start = {"rosenbrock": jnp.zeros(2), "parabola": jnp.zeros((2, 2))}

    def step(carry, _):
        params, opt_state = carry
        value, grads = jax.value_and_grad(objective)(params)
        extra = {
            "lbfgs": {"value": value, "grad": grads, "value_fn": objective},
            "sam": {"grad_fn": jax.grad(lambda params, _: objective(params))},
            "sophia": {"obj_fn": objective},
        }.get(name, {"value": value})
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), (params, value)

    @jax.jit
    def run(params):
        carry = (params, tx.init(params))
        (params, opt_state), history = jax.lax.scan(step, carry, length=12)
        states = zip(cases, opt_state[1:], strict=True)
        return history, [case.read(state, params) for case, state in states]

    (params, values), averages = jax.device_get(run(start))
    assert values[-1] < values[0]
    history = [jax.tree.map(lambda x, t=t: x[t], params) for t in range(12)]
    for case, average in zip(cases, averages, strict=True):
        case.assert_average(average, history)


@every_case
def test_updates_pass_through_bit_for_bit(case):
    updates = {
        "f32": np.array([-0.0, np.inf, -np.inf, 1e-40, 3.0], np.float32),
        "nan": np.array([0x7FC12345, 0xFFC00001], np.uint32).view(np.float32),
        "bf16": np.array([1.0, -0.0, np.nan], jnp.bfloat16),
        "int": np.arange(3, dtype=np.int32),
        "complex": np.array([1 - 2j, np.nan], np.complex64),
    }
    params = jax.tree.map(np.ones_like, updates)
    tx = case.make()
    out, _ = jax.jit(lambda u, p: tx.update(u, tx.init(p), p))(updates, params)
    assert bits(out) == bits(updates)
    assert shapes(out) == shapes(updates)


@every_method
def test_unknown_extra_arguments_are_let_through(case):
    # Directly: a chain would drop them before a transformation that refuses them.
    tx = case.make()
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    params, opt_state, history = train(
        optax.GradientTransformationExtraArgs(
            tx.init, functools.partial(tx.update, loss=jnp.float32(1), fn=len, x=None)
        ),
        model(),
    )
    case.assert_run(params, opt_state, history)


def test_extra_arguments_reach_those_behind():
    def update(updates, state, params=None, *, scale, **extra_args):
        del params, extra_args
        return jax.tree.map(lambda g: scale * g, updates), state

    scaled = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )
    first, *rest = (case.make() for case in ONE_CASE.values())
    tx = optax.chain(optax.sgd(0.5), first, *rest, scaled)
    params = {"w": jnp.ones(2)}
    updates, _ = tx.update(params, tx.init(params), params, scale=jnp.float32(4))
    np.testing.assert_array_equal(updates["w"], [-2.0, -2.0])


@every_method
@pytest.mark.parametrize("wrap", [lambda tx: tx, jax.jit], ids=["eager", "jit"])
def test_update_needs_params(case, wrap):
    tx = case.make()
    updates = {"w": jnp.ones(2)}
    state = tx.init(updates)
    update = jax.jit(tx.update) if wrap is jax.jit else tx.update
    for arguments in ((updates, state), (updates, state, None)):
        with pytest.raises(
            ValueError, match=r"params=None.*tx\.update\(updates, opt_s"
        ):
            update(*arguments)


# Wrapped and combined.


WRAPPERS = {
    "chains": lambda tx: optax.chain(
        optax.clip_by_global_norm(1.0), optax.chain(optax.lion(0.1), optax.chain(tx))
    ),
    "named_chain": lambda tx: optax.named_chain(("sgd", optax.sgd(0.1)), ("avg", tx)),
    "apply_every": lambda tx: optax.chain(optax.sgd(0.1), optax.apply_every(2), tx),
    "freeze": lambda tx: optax.chain(
        optax.sgd(0.1), optax.transforms.freeze({"encoder": True, "head": False}), tx
    ),
    "selective_transform": lambda tx: optax.transforms.selective_transform(
        optax.chain(optax.sgd(0.1), tx), freeze_mask={"encoder": True, "head": False}
    ),
    "conditionally_transform": lambda tx: optax.conditionally_transform(
        optax.chain(optax.sgd(0.1), tx), lambda step: step >= 0
    ),
    "conditionally_mask": lambda tx: optax.conditionally_mask(
        optax.chain(optax.sgd(0.1), tx), lambda step: step >= 0
    ),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(
        lambda rate: optax.chain(optax.sgd(rate), tx)
    )(optax.piecewise_constant_schedule(0.5, {2: 0.5})),
}


@every_method
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_inside(case, wrapper):
    tx = WRAPPERS[wrapper](case.make())
    params, opt_state, history = train(tx, model())
    assert type(case.state(opt_state)) is case.method.state
    case.assert_run(params, opt_state, history)


@every_case
def test_run(case):
    tx = optax.chain(optax.sgd(0.1), case.make())
    params, opt_state, history = train(tx, model())
    case.assert_run(params, opt_state, history)
    case.assert_average(case.read(opt_state, params), history)  # without jit


SKIPPING = {
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 5),
    "multi_steps": lambda tx: optax.MultiSteps(
        tx, every_k_schedule=1, should_skip_update_fn=optax.skip_not_finite
    ),
}


@every_method
@pytest.mark.parametrize("wrapper", SKIPPING)
def test_a_step_that_a_wrapper_undoes_is_no_update(case, wrapper):
    tx = SKIPPING[wrapper](optax.chain(optax.sgd(1.0), case.make()))
    step = jax.jit(make_step(tx, lambda params, value: {"w": jnp.full(2, -value)}))
    params = {"w": jnp.zeros(2)}
    opt_state, history = tx.init(params), []
    for value in (1.0, np.nan, 2.0, 8.0, np.inf, 3.0, 5.0):
        params, opt_state = step(params, opt_state, value)
        if np.isfinite(value):
            history.append(jax.device_get(params))
    assert [x["w"][0] for x in history] == [1, 3, 11, 14, 19]
    case.assert_run(params, opt_state, history)


# Mean gradients of the mini-batches in fours: 1, 2, 6, 2 and 1.
MINI_BATCHES = (1, 1, 1, 1, 0, 4, 2, 2, 6, 6, 12, 0, 2, 2, 2, 2, 0, 0, 4, 0)


def accumulate(tx, dtype=jnp.float32):
    """The weights after every mini-batch, and the last state."""
    step = jax.jit(make_step(tx, lambda params, g: {"w": jnp.full(2, -g, dtype)}))
    params = {"w": jnp.zeros(2, dtype)}
    opt_state, history = tx.init(params), []
    for value in MINI_BATCHES:
        params, opt_state = step(params, opt_state, value)
        history.append(jax.device_get(params))
    return params, opt_state, history


@every_method
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_inside_multi_steps_counts_optimizer_steps(case, dtype):
    tx = optax.MultiSteps(optax.chain(optax.sgd(1.0), case.make()), every_k_schedule=4)
    params, opt_state, history = accumulate(tx, dtype)
    weights = [float(x["w"][0]) for x in history]
    assert weights[:3] == [0, 0, 0]  # nothing before the fourth
    assert weights[3::4] == [1, 3, 9, 11, 12]
    case.assert_run(params, opt_state, history[3::4])


@every_method
def test_behind_multi_steps_counts_mini_batches(case):
    multi = optax.MultiSteps(optax.sgd(1.0), every_k_schedule=4)
    tx = optax.chain(multi.gradient_transformation(), case.make())
    case.assert_run(*accumulate(tx))


FROZEN = {"encoder": {"w": False, "b": True}, "head": {"w": True}}


def freeze(trained):
    """Only the weights of ``FROZEN`` that are true are trained."""
    inverse = jax.tree.map(lambda x: not x, FROZEN)
    return optax.chain(
        optax.masked(trained, FROZEN), optax.masked(optax.set_to_zero(), inverse)
    )


def trained_part(tree):
    return {"b": tree["encoder"]["b"], "w": tree["head"]["w"]}


@every_method
def test_inside_masked(case):
    start = model()
    tx = freeze(optax.chain(optax.sgd(0.1), case.make()))
    params, opt_state, history = train(tx, start)
    average = case.read(opt_state, params)
    assert bits(average["encoder"]["w"]) == bits(params["encoder"]["w"])
    assert bits(params["encoder"]["w"]) == bits(start["encoder"]["w"])
    case.assert_average(trained_part(average), list(map(trained_part, history)))
    # The state holds nothing of the frozen weight's shape.
    state = case.state(opt_state)
    assert not [x for x in jax.tree.leaves(state) if x.shape[-2:] == (4, 3)]


@every_method
def test_inside_a_masked_subtree(case):
    # A mask may be a prefix of the parameters: it hides a whole subtree at once.
    mask = {"encoder": False, "head": True}
    tx = optax.masked(optax.chain(optax.sgd(0.1), case.make()), mask)
    params, opt_state, history = train(tx, model())
    for read in (case.read, jax.jit(case.read)):
        average = read(opt_state, params)
        assert bits(average["encoder"]) == bits(params["encoder"])
        case.assert_average(average["head"], [models["head"] for models in history])


@every_method
def test_behind_masked(case):
    # Freezing before, averaging all: frozen weights average to themselves.
    tx = optax.chain(freeze(optax.sgd(0.1)), case.make())
    params, opt_state, history = train(tx, model())
    case.assert_run(params, opt_state, history)
    assert bits(history[-1]["encoder"]["w"]) == bits(model()["encoder"]["w"])


def partition(groups):
    make = getattr(optax, "partition", None) or optax.multi_transform
    return make(groups, {"encoder": "slow", "head": "fast"})


@every_method
def test_inside_one_group_of_a_partition(case):
    fast = optax.chain(optax.sgd(0.1), case.make())
    tx = partition({"slow": optax.sgd(0.01), "fast": fast})
    params, opt_state, history = train(tx, model())
    average = case.read(opt_state, params)
    assert bits(average["encoder"]["w"]) == bits(params["encoder"]["w"])
    case.assert_average(average["head"], [models["head"] for models in history])


@every_method
def test_behind_a_partition(case):
    groups = {"slow": optax.sgd(0.01), "fast": optax.adam(0.1)}
    params, opt_state, history = train(
        optax.chain(partition(groups), case.make()), model()
    )
    case.assert_run(params, opt_state, history)


@every_method
def test_inside_both_groups_of_a_partition(case):
    tx = partition(
        {
            "slow": optax.chain(optax.sgd(0.01), case.make()),
            "fast": optax.chain(optax.sgd(0.1), case.make()),
        }
    )
    params, opt_state, history = train(tx, model())
    name = case.method.state.__name__
    with pytest.raises(ValueError, match=rf"holds 2 {name}s.*'fast'.*'slow'"):
        case.read(opt_state, params)
    # "Pass the part that you mean" is advice that works.
    for group, part in (("slow", "encoder"), ("fast", "head")):
        average = case.read(opt_state.inner_states[group], params)
        case.assert_average(average[part], [models[part] for models in history])


# Optimizers that step aside from the weights that they keep.


def run_sam(tx):
    """Eight steps, of which every second is an optimizer step."""
    step = jax.jit(make_step(tx, lambda p: p - 3.0))
    params = jnp.array([0.0, 1.0])
    opt_state, history = tx.init(params), []
    for _ in range(8):
        params, opt_state = step(params, opt_state)
        history.append(jax.device_get(params))
    return params, opt_state, history


@every_method
def test_inside_sam_only_optimizer_steps_count(case):
    tx = contrib.sam(optax.chain(optax.sgd(0.5), case.make()), **SAM, sync_period=2)
    params, opt_state, history = run_sam(tx)
    case.assert_run(params, opt_state, history[1::2])


@every_method
def test_behind_sam_the_period_leaves_out_adversarial_weights(case):
    case = Case(case.method, {"start_step": 4, "period": 2})
    tx = optax.chain(contrib.sam(optax.sgd(0.5), **SAM, sync_period=2), case.make())
    case.assert_run(*run_sam(tx))


def run_lookahead(tx):
    @jax.jit
    def step(params, opt_state):
        grads = jax.tree.map(lambda w: w - 3.0, params.fast)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = optax.LookaheadParams.init_synced({"w": jnp.array([0.0, 1.0])})
    opt_state, history = tx.init(params), []
    for _ in range(8):
        params, opt_state = step(params, opt_state)
        history.append(jax.device_get(params))
    return params, opt_state, history


@every_method
def test_behind_lookahead(case):
    # The average has fast and slow weights as well.
    slow = optax.lookahead(optax.sgd(0.5), sync_period=3, slow_step_size=0.5)
    params, opt_state, history = run_lookahead(optax.chain(slow, case.make()))
    assert bits(history[-1].fast) != bits(history[-1].slow)
    case.assert_run(params, opt_state, history)


REWRITING = {
    "lookahead": lambda tx: optax.lookahead(tx, sync_period=3, slow_step_size=0.5),
    "mechanize": contrib.mechanize,
    "schedule_free": lambda tx: contrib.schedule_free(tx, 0.5),
}


@every_method
@pytest.mark.parametrize("wrapper", REWRITING)
def test_inside_a_wrapper_that_rewrites_the_updates(case, wrapper):
    tx = REWRITING[wrapper](optax.chain(optax.sgd(0.5), case.make()))
    run = run_lookahead if wrapper == "lookahead" else lambda tx: train(tx, model())
    params, opt_state, _ = run(tx)
    params = params.fast if wrapper == "lookahead" else params
    with pytest.raises(ValueError, match=r"put swa\(\) behind the wrapper"):
        case.read(opt_state, params)


# Hyperparameters as arrays.


@every_case
def test_inject_hyperparams_is_the_same_average(case):
    params, opt_state, history = train(
        optax.chain(optax.sgd(0.1), case.inject()), model()
    )
    case.assert_run(params, opt_state, history)
    plain = jax.eval_shape(case.make().init, params)
    assert shapes(case.state(opt_state)) == shapes(plain)


@every_method
def test_inject_hyperparams_keeps_large_steps_exact(case):
    # As float32 they would be rounded to an even number, in bfloat16 to 2^24.
    start = 2**24 + 1
    tx = Case(case.method, {"start_step": start, "period": start}).inject()
    params = jnp.zeros(2, jnp.bfloat16)
    opt_state, update = tx.init(params), jax.jit(tx.update)
    for t, count in ((start - 1, 0), (start, 1), (start + 1, 0)):
        before = optax.tree.set(opt_state, num_updates=jnp.int32(t - 1))
        _, after = update(params, before, params)
        assert int(case.state(after).num_averaged) == count


@every_method
def test_hyperparameters_of_each_member_of_an_ensemble(case):
    # One compiled step for several starts at once.
    starts = (1, 2, 4)
    tx = case.inject()

    def average(start, updates):
        params = jnp.zeros(2)
        state = tx.init(params)
        state.hyperparams.update(start_step=start)
        for update in updates:
            out, state = tx.update(update, state, params)
            params = optax.apply_updates(params, out)
        return case.read(state, params)

    updates = jnp.arange(12.0).reshape(6, 2)
    found = jax.jit(jax.vmap(average, (0, None)))(jnp.array(starts), updates)
    history = list(np.cumsum(updates, 0))
    for start, got in zip(starts, found, strict=True):
        options = {**case.options, "start_step": start}
        Case(case.method, options).assert_average(got, history)


# Dtypes and types.

DTYPES = (
    jnp.float16,
    jnp.bfloat16,
    jnp.float32,
    jnp.float64,
    jnp.complex64,
    jnp.complex128,
)


@every_method
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("enable_x64")
def test_types_are_stable(case, dtype):
    # A branch has both its sides agree, of weakly and strongly typed values too.
    tx = optax.chain(optax.sgd(0.1), case.make())
    start = jnp.array([-1.0, 10.0, 1.0], dtype)

    def step(params, opt_state, t):
        updates, new = tx.update(gradient(params, t), opt_state, params)
        assert types(new) == types(opt_state)
        assert types(updates) == types(params)
        opt_state = jax.lax.cond(t >= 0, lambda: new, lambda: opt_state)
        return optax.apply_updates(params, updates), opt_state

    step, params, opt_state = jax.jit(step), start, tx.init(start)
    assert types(jax.jit(tx.init)(start)) == types(opt_state)
    history = []
    for t in range(5):
        params, opt_state = step(params, opt_state, jnp.float32(t))
        history.append(jax.device_get(params))
    assert programs(step) == 1
    case.assert_run(params, opt_state, history)


def mixed():
    """Parameters of many dtypes and shapes."""
    return {
        "bf16": np.ones(2, jnp.bfloat16),
        "f32": np.ones((2, 2), np.float32),
        "f64": np.ones(3, np.float64),
        "complex": np.ones(2, np.complex64),
        "int": np.arange(3, dtype=np.int16),
        "step": np.int32(3),
        "empty": np.ones((0, 3), np.float32),
    }


@every_case
@pytest.mark.usefixtures("enable_x64")
def test_mixed_dtypes(case):
    tx, params = case.make(), mixed()

    @jax.jit
    def step(params, opt_state):
        updates = jax.tree.map(jnp.ones_like, params)
        updates, new = tx.update(updates, opt_state, params)
        assert types(new) == types(opt_state)
        assert types(updates) == types(params)
        return optax.apply_updates(params, updates), new

    opt_state, history = jax.jit(tx.init)(params), []
    for _ in range(4):
        params, opt_state = step(params, opt_state)
        history.append(jax.device_get(params))
    case.assert_run(params, opt_state, history)


@every_method
def test_types_are_stable_without_jit(case):
    tx, params = (
        case.make(),
        {"weak": jnp.asarray(1.0), "bf16": jnp.ones(2, "bfloat16")},
    )
    state = tx.init(params)
    expected = types(state)
    _, state = tx.update(params, state, params)
    assert types(state) == expected


@every_method
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_weights_enter_as_they_are_stored(case, dtype):
    # Inside one compiled step XLA may keep sums in float32 ("excess precision"): the
    # average must still be that of the rounded weights. One model, so bit for bit.
    params = jnp.linspace(-3, 3, 4096).astype(dtype)
    tx = optax.chain(optax.sgd(0.1), Case(case.method).make())
    params, opt_state, _ = train(tx, params, 1)
    assert bits(case.read(opt_state, params)) == bits(params)


@every_method
def test_weights_of_numpy_enter_as_numpy_adds_them(case):
    # In float64, which JAX then stores as float32: what is left of 1/3 less its float32
    # is not 0, as it is where both are float32 before they are added.
    params = {"x": np.full(3, 1 / 3), "y": 1 / 3, "n": np.arange(2)}
    updates = {"x": np.full(3, np.float32(-1 / 3)), "y": float(np.float32(-1 / 3))}
    updates["n"] = np.ones(2, np.int64)
    tx = Case(case.method).make()
    _, state = tx.update(updates, tx.init(params), params)
    stored = optax.apply_updates(params, updates)
    left = np.float32(1 / 3 - np.float64(np.float32(1 / 3)))
    assert left
    np.testing.assert_array_equal(stored["x"], np.full(3, left))
    assert bits(case.read(state, stored)) == bits(stored)


@every_method
def test_no_more_traces_for_weakly_typed_parameters(case):
    # As in a notebook: the first parameters are weakly typed, stored ones are not.
    # That alone traces the caller's step twice, with an average or without.
    params = {"scale": jnp.asarray(2.0), "shift": jnp.asarray(1.0)}
    counts = []
    for tx in (optax.sgd(0.1), optax.chain(optax.sgd(0.1), case.make())):
        step = jax.jit(make_step(tx))
        trained, opt_state = params, tx.init(params)
        for t in range(5):
            trained, opt_state = step(trained, opt_state, jnp.float32(t))
        counts.append(programs(step))
    assert counts[0] == counts[1] == 2


class TestVariants(chex.TestCase):
    """Compiled or not, from this device or another: the same average."""

    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    @parameterized.parameters([(name,) for name in ONE_CASE])
    def test_variant(self, name):
        case = ONE_CASE[name]
        tx = optax.chain(optax.sgd(0.5), case.make())
        params = {"w": jnp.ones(2)}
        chex.clear_trace_counter()
        step = chex.assert_max_traces(make_step(tx, lambda p: p), 5)
        step = self.variant(step)
        opt_state, history = self.variant(tx.init)(params), []
        for _ in range(5):
            params, opt_state = step(params, opt_state)
            history.append(jax.device_get(params))
        case.assert_run(params, opt_state, history)


# Loops and other transformations of JAX.


@every_method
def test_one_trace_for_many_steps(case):
    tx = optax.chain(optax.adam(0.1), case.make())
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(make_step(tx), 1), donate_argnums=(0, 1))
    params = model()
    opt_state = tx.init(params)
    for t in range(6):
        params, opt_state = step(params, opt_state, jnp.float32(t))


@every_method
def test_scan(case):
    tx = optax.chain(optax.sgd(0.1, momentum=0.5), case.make())
    step = make_step(tx)

    def body(carry, t):
        carry = step(*carry, t)
        return carry, carry[0]

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def run(params, opt_state):
        return jax.lax.scan(body, (params, opt_state), jnp.arange(8.0))

    (params, opt_state), stored = run(model(), tx.init(model()))
    stored = jax.device_get(stored)
    history = [jax.tree.map(lambda x, t=t: x[t], stored) for t in range(8)]
    case.assert_run(params, opt_state, history)


@every_method
def test_vmap_over_seeds(case):
    tx = optax.chain(optax.sgd(0.25), case.make())
    params = {"w": jnp.arange(12.0).reshape(4, 3)}
    opt_state = jax.vmap(tx.init)(params)
    step = jax.jit(jax.vmap(make_step(tx, lambda p: p)))
    history = []
    for _ in range(6):
        params, opt_state = step(params, opt_state)
        history.append(jax.device_get(params))
    state = case.state(opt_state)
    np.testing.assert_array_equal(counters(state), [[6] * 4, [2] * 4])
    for read in (case.read, jax.jit(jax.vmap(case.read))):
        case.assert_average(read(opt_state, params), history)


@every_method
def test_pmap(case):
    # Data parallel: each of eight devices keeps the same weights and average.
    tx = optax.chain(optax.sgd(0.25), case.make())
    step = make_step(tx, lambda p, x: {"w": p["w"] - jax.lax.pmean(x, "data")})
    step = jax.pmap(step, axis_name="data")
    params = {"w": jnp.zeros((8, 3))}
    opt_state, history = jax.pmap(tx.init)(params), []
    for t in range(6):
        batch = jnp.arange(24.0).reshape(8, 3) + t
        params, opt_state = step(params, opt_state, batch)
        history.append(jax.device_get(params))
    assert np.ptp(history[-1]["w"], axis=0).max() == 0
    for read in (case.read, jax.pmap(case.read)):
        case.assert_average(jax.device_get(read(opt_state, params)), history)


def linear_run(case, wrap=lambda step: step):
    """The average, from the updates of every step."""
    tx = case.make()
    step = wrap(make_step(tx, lambda params, update: update))

    def average(updates):
        params = jnp.zeros(updates.shape[1:])
        opt_state = tx.init(params)
        for update in updates:
            params, opt_state = step(params, opt_state, update)
        return case.read(opt_state, params)

    return average


@every_method
@pytest.mark.parametrize(
    "wrap",
    [lambda step: step, jax.checkpoint, jax.jit],
    ids=["plain", "checkpoint", "jit"],
)
def test_derivatives(case, wrap):
    # The weights after update t are the sum of updates 1 to t: so an update counts for
    # as much as all models from it on.
    steps = 8
    counts = np.zeros(steps)
    sampled = case.sampled(steps)
    counts[np.array(sampled) - 1] = case.method.weights(len(sampled))
    expected = np.cumsum(counts[::-1])[::-1]
    average = linear_run(case, wrap)
    updates = jnp.arange(steps, dtype=jnp.float32)[:, None]
    (reverse,) = jax.jit(jax.jacrev(average))(updates)
    np.testing.assert_allclose(reverse[:, 0], expected, atol=steps * 4 * U)
    if wrap is not jax.checkpoint:  # which knows no forward mode of custom rules
        (forward,) = jax.jit(jax.jacfwd(average))(updates)
        np.testing.assert_allclose(forward[:, 0], expected, atol=steps * 4 * U)


# Whatever holds the parameters.


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    w: jax.Array
    b: jax.Array


class Pair(NamedTuple):
    w: jax.Array
    b: jax.Array


class Module(eqx.Module):
    w: jax.Array
    activation: Callable = jax.nn.relu


CONTAINERS = {
    "array": lambda: jnp.arange(3.0),
    "sequences": lambda: ([jnp.arange(3.0)], Pair(jnp.ones((2, 2)), jnp.ones(()))),
    "dataclass": lambda: Layer(jnp.arange(3.0), jnp.ones(())),
    "mappings": lambda: flax.core.freeze({"a": {10: jnp.ones(2), 9: jnp.ones(3)}}),
    # What Equinox trains of a module: the arrays in it, None for the rest.
    "equinox": lambda: eqx.filter(Module(jnp.arange(3.0)), eqx.is_inexact_array),
}


@every_method
@pytest.mark.parametrize("container", CONTAINERS)
def test_containers(case, container):
    start = CONTAINERS[container]()
    tx = optax.chain(optax.adam(0.1), case.make())
    params, opt_state, history = train(tx, start)
    assert structure(case.read(opt_state, params)) == structure(start)
    case.assert_run(params, opt_state, history)


@every_case
@pytest.mark.parametrize("empty", [{}, (), {"a": None, "b": []}], ids=str)
def test_no_parameters(case, empty):
    tx = optax.chain(optax.adam(0.1), case.make())
    update, opt_state = jax.jit(tx.update), tx.init(empty)
    for _ in range(4):
        updates, opt_state = update(empty, opt_state, empty)
        assert updates == empty
    counted = counters(case.state(opt_state))
    assert tuple(map(int, counted)) == (4, len(case.sampled(4)))
    assert case.read(opt_state, empty) == empty


@every_case
def test_program_grows_by_a_constant_for_each_leaf(case):
    # As it must: a large network has thousands.
    tx = case.make()

    def size(leaves):
        params = {str(i): np.ones(2, np.float32) for i in range(leaves)}
        state = jax.eval_shape(tx.init, params)
        return len(jax.make_jaxpr(tx.update)(params, state, params).eqns)

    few, more, most = size(10), size(110), size(210)
    assert most - more == more - few <= 100 * 25


# Devices.

SPECS = {"w": P("x", None), "v": P(None, "x"), "h": P("x"), "b": P()}


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(request.param,))
    explicit = request.param == AxisType.Explicit
    with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
        yield mesh


def sharded(mesh):
    params = {
        "w": np.ones((8, 4), np.float32),
        "v": np.ones((2, 16), np.float32),
        "h": np.ones((8, 2), jnp.bfloat16),
        "b": np.ones(3, np.float32),
    }
    return jax.device_put(params, {k: NamedSharding(mesh, SPECS[k]) for k in SPECS})


def specs(state, params):
    """How a state is divided whose fields but two counters are like the parameters."""

    def spec(param, spec, leaf):  # which may have axes before those of its parameter
        return P(*[None] * (leaf.ndim - param.ndim), *spec)

    whole = jax.tree.map(lambda _: P(), state)
    divided = iter([jax.tree.map(spec, params, SPECS, tree) for tree in trees(state)])
    return jax.tree.map(
        lambda part: next(divided) if isinstance(part, dict) else part,
        whole,
        is_leaf=lambda x: isinstance(x, dict | P),
    )


def assert_placed(tree, specs, mesh):
    def check(leaf, spec):
        target = NamedSharding(mesh, spec)
        assert leaf.sharding.is_equivalent_to(target, leaf.ndim), leaf.sharding

    jax.tree.map(check, tree, specs)


@every_method
@pytest.mark.parametrize("init", ["eager", "jit"])
def test_state_lies_where_the_parameters_do(case, mesh, init):
    tx = case.make()
    params = sharded(mesh)
    state = (jax.jit(tx.init) if init == "jit" else tx.init)(params)
    divided = specs(state, params)
    assert_placed(trees(state), trees(divided), mesh)
    step = jax.jit(make_step(tx, lambda p: p))
    for _ in range(3):
        params, state = step(params, state)
        assert_placed(params, SPECS, mesh)
        assert_placed(state, divided, mesh)
    assert_placed(case.read(state, params), SPECS, mesh)


@every_method
def test_sharded_step_communicates_no_more(case, mesh):
    params = sharded(mesh)

    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
    found = []
    for tx in (clipped, optax.chain(clipped, case.make())):
        step = jax.jit(make_step(tx, lambda p: p))
        found.append(collectives(step.lower(params, tx.init(params)).compile()))
    assert found[0] == found[1]
    assert found[0]  # a global norm does communicate


@every_method
@pytest.mark.parametrize("mesh", [AxisType.Explicit], ids=["explicit"], indirect=True)
def test_sharded_types_are_the_same_with_and_without_jit(case, mesh):
    tx, params = case.make(), sharded(mesh)
    start = tx.init(params)
    expected = types(start)
    assert types(jax.jit(tx.init)(params)) == expected
    assert types(tx.update(params, start, params)[1]) == expected
    assert types(jax.jit(tx.update)(params, start, params)[1]) == expected


@every_method
def test_shard_map(case, mesh):
    # Each device averages its own part of the weights.
    tx = optax.chain(optax.sgd(0.25), case.make())
    params = sharded(mesh)
    opt_state = tx.init(params)
    divided = (SPECS, (P(), specs(case.state(opt_state), params)))
    step = jax.jit(
        jax.shard_map(
            make_step(tx, lambda p: p), mesh=mesh, in_specs=divided, out_specs=divided
        )
    )
    history = []
    for _ in range(5):
        params, opt_state = step(params, opt_state)
        history.append(jax.device_get(params))
    case.assert_run(params, opt_state, history)


# Without values.


@every_case
def test_abstract_values(case):
    tx = optax.chain(optax.adam(0.1), case.make())
    params = model()
    abstract = jax.eval_shape(model)
    opt_state = jax.eval_shape(tx.init, abstract)
    assert shapes(opt_state) == shapes(tx.init(params))
    updates, new_state = jax.eval_shape(tx.update, abstract, opt_state, abstract)
    assert shapes(updates) == shapes(params)
    assert shapes(new_state) == shapes(opt_state)


@every_case
def test_init_of_shapes(case):
    tx, abstract = case.make(), jax.eval_shape(model)
    assert shapes(tx.init(abstract)) == shapes(tx.init(model()))


# The state as a tree.


@every_case
def test_state_is_a_named_tuple_of_arrays(case):
    state = case.make().init(model())
    assert type(state) is case.method.state
    assert list(fields(state))[:2] == ["num_updates", "num_averaged"]
    leaves = jax.tree.leaves(state)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    for counter in counters(state):
        assert (counter.shape, counter.dtype, int(counter)) == ((), jnp.int32, 0)
    assert not state._field_defaults  # which would be made at import
    # A buffer for each, none of them the parameters': all can be donated at once.
    buffers = {leaf.unsafe_buffer_pointer() for leaf in leaves}
    assert len(buffers) == len(leaves)


@every_method
def test_optax_finds_fields_by_name(case):
    tx = optax.chain(optax.adam(0.1), case.make())
    _, opt_state, _ = train(tx, model(), 4)
    state = case.state(opt_state)
    assert int(optax.tree.get(opt_state, "count")) == 4  # Adam's alone
    for name, value in fields(state).items():
        assert optax.tree.get(opt_state, name) is value
    changed = optax.tree.set(opt_state, num_updates=jnp.int32(9), count=jnp.int32(5))
    assert int(case.state(changed).num_updates) == 9
    assert int(case.state(changed).num_averaged) == int(state.num_averaged)
    assert bits(trees(case.state(changed))) == bits(trees(state))
    assert int(changed[0][0].count) == 5


MAPPED = {
    "chain": lambda tx: optax.chain(optax.adam(0.1), tx),
    "injected": lambda tx: optax.inject_hyperparams(
        lambda rate: optax.chain(optax.adam(rate), tx)
    )(0.1),
    "multi_steps": lambda tx: optax.MultiSteps(optax.chain(optax.adam(0.1), tx), 2),
}


@every_case
@pytest.mark.parametrize("wrapper", MAPPED)
def test_tree_map_params(case, wrapper):
    tx, params = MAPPED[wrapper](case.make()), model()
    names = {"encoder": {"w": "ew", "b": "eb"}, "head": {"w": "hw"}}
    opt_state = tx.init(params)
    state = case.state(
        optax.tree_map_params(
            tx,
            lambda leaf, name: (name, leaf.ndim),
            opt_state,
            names,
            transform_non_params=lambda leaf: "other",
        )
    )
    assert counters(state) == ("other", "other")
    pairs = zip(trees(state), trees(case.state(opt_state)), strict=True)
    for tree, leaves in pairs:
        assert tree == jax.tree.map(lambda name, x: (name, x.ndim), names, leaves)


@every_method
def test_tree_map_params_inside_masked(case):
    tx = optax.masked(optax.chain(optax.adam(0.1), case.make()), FROZEN)
    mapped = optax.tree_map_params(tx, lambda leaf: "weight", tx.init(model()))
    for tree in trees(case.state(mapped)):
        assert jax.tree.leaves(tree) == ["weight"] * 2
        assert tree["encoder"]["w"] == optax.MaskedNode()


@every_method
def test_tree_map_params_with_a_tree_of_shardings(case, mesh):
    everywhere = jax.tree.map(lambda _: NamedSharding(mesh, P()), model())
    tx = Case(case.method, {"sharding": everywhere}).make()
    mapped = optax.tree_map_params(tx, lambda leaf: "weight", tx.init(model()))
    for tree in trees(mapped):
        assert set(jax.tree.leaves(tree)) == {"weight"}


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda tree: pickle.loads(pickle.dumps(tree)),
    "deepcopy": copy.deepcopy,
    "numpy": jax.device_get,
    "flatten": lambda tree: jax.tree.unflatten(
        jax.tree.structure(tree), jax.tree.leaves(tree)
    ),
}


@every_method
def test_training_goes_on_from_a_copy(case):
    tx = optax.chain(optax.adam(0.1), case.make())
    params, opt_state, _ = train(tx, model(), 3)
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(make_step(tx), 1))

    def go_on(params, opt_state):
        for t in range(3):
            params, opt_state = step(params, opt_state, jnp.float32(t))
        return params, opt_state, case.read(opt_state, params)

    expected = go_on(params, opt_state)
    for name, copied in COPIES.items():
        found = go_on(*copied((params, opt_state)))
        assert bits(found) == bits(expected), name
        assert types(found) == types(expected), name


@every_method
@pytest.mark.parametrize("jit_init", [False, True])
def test_params_and_state_may_be_donated_together(case, jit_init):
    # `init` that aliased the parameters would donate one buffer twice.
    tx = optax.chain(optax.sgd(0.5), case.make())
    step = jax.jit(make_step(tx), donate_argnums=(0, 1))
    params = model()
    opt_state = (jax.jit(tx.init) if jit_init else tx.init)(params)
    history = []
    for t in range(5):
        old = (params, opt_state)
        params, opt_state = step(params, opt_state, jnp.float32(t))
        history.append(jax.tree.map(np.array, params))
        assert all(x.is_deleted() for x in jax.tree.leaves(old))
    average = case.read(opt_state, params)
    # Reading is no donation, and gives no buffer of the state away.
    jax.tree.map(lambda x: x.delete(), average)
    case.assert_run(params, opt_state, history)
