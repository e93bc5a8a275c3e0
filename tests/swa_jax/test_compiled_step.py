"""What averaging adds to a compiled training step: no temporary, no copy.

``test_battery.py`` has the results of such steps.
"""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.flatten_util import ravel_pytree

import swa_jax

from ..compiled import assert_in_place, bytes_per_device, memory
from .transformations import accumulate, every_case, every_method, make_step, trees

#: The default run takes two cases of each test here, see conftest.py.
pytestmark = pytest.mark.sample(2)


def large() -> dict[str, jax.Array]:
    """1.3 MB of parameters: counters and scalars vanish beside them."""
    return {"w": jnp.ones((512, 512)), "v": jnp.ones((512, 128)), "b": jnp.ones(7)}


def one_step(tx):
    """A training step on every leaf by itself."""
    return make_step(tx, lambda params: jax.tree.map(jnp.sin, params))


def four_steps(tx):
    """In one call."""
    step = one_step(tx)

    def run(*carry):
        return jax.lax.scan(lambda c, _: (step(*c), None), carry, length=4)[0]

    return run


def compile_step(make, tx, *, donate=(0, 1), dtype=jnp.float32):
    """The executable, what it takes over, and the average in it."""
    params = jax.tree.map(lambda x: x.astype(dtype), large())
    opt_state = tx.init(params)
    lowered = jax.jit(make(tx), donate_argnums=donate).lower(params, opt_state)
    average = trees(opt_state[-1])
    return lowered.compile(), (params, opt_state), average


# One program serves sampled and skipped steps: the first three take both ways.
@pytest.mark.parametrize("make", [one_step, four_steps])
@every_case
def test_training_step_is_in_place(make, case):
    narrow = "accumulator_dtype" in case.options
    if case.method.make is swa_jax.swag and narrow and jax.__version_info__ < (0, 10):
        pytest.skip("the CPU compiler of older JAX stores what it rounds to bfloat16")
    tx = optax.chain(optax.sgd(0.1), case.make())
    compiled, donated, average = compile_step(make, tx)
    weights = bytes_per_device(donated[0])
    if case.options.get("skip_nonfinite") and bytes_per_device(average) > weights:
        # The updated weights are read twice; where more than a mean is kept of them,
        # XLA for CPUs stores them in between.
        found = memory(compiled)
        assert found.aliased >= bytes_per_device(donated), found
        assert found.temporary <= 1.01 * weights, found
        assert found.copied <= 0.01 * weights, found
        return
    assert_in_place(compiled, donated=donated, average=average)


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10),
    reason="the CPU compiler of older JAX copies bfloat16 weights in this step",
)
@pytest.mark.parametrize("make", [one_step, four_steps])
@every_method
def test_training_step_in_bfloat16_is_in_place(make, case):
    # XLA used to keep the unrounded sum for the mean, and the old weights with it.
    tx = optax.chain(optax.sgd(0.1), case.make())
    compiled, donated, average = compile_step(make, tx, dtype=jnp.bfloat16)
    assert_in_place(compiled, donated=donated, average=average)


@every_method
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_training_step_takes_no_more_than_without(case, optimizer):
    make = {
        "momentum": lambda: optax.sgd(0.1, momentum=0.9),
        "adamw": lambda: optax.adamw(0.1),
    }[optimizer]
    params = {"w": jnp.ones((256, 128)), "v": jnp.ones((128, 256))}
    x = jnp.ones((16, 256))

    def loss(params):
        return jnp.sum(jnp.tanh(x @ params["w"]) @ params["v"])

    found = []
    for tx in (make(), optax.chain(make(), case.make())):
        jitted = jax.jit(make_step(tx, jax.grad(loss)), donate_argnums=(0, 1))
        found.append(memory(jitted.lower(params, tx.init(params)).compile()))
    base, extended = found
    size = bytes_per_device(params)
    assert extended.temporary - base.temporary < 0.01 * size
    assert extended.copied - base.copied < 0.01 * size
    state = bytes_per_device(case.make().init(params))
    assert extended.aliased - base.aliased == state >= size + 8  # with two counters


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
            flat, unravel = ravel_pytree(
                jax.tree.map(
                    lambda p, u, m: jnp.asarray(optax.apply_updates(p, u), m.dtype),
                    params,
                    updates,
                    state.avg_params,
                )
            )
            mean = ravel_pytree(state.avg_params)[0]
            mean = jnp.where(
                sample, mean + (flat - mean) / (state.num_averaged + 1), mean
            )
            new = state._replace(avg_params=unravel(mean))
        return updates, new._replace(num_updates=t)

    return optax.GradientTransformationExtraArgs(swa_jax.swa().init, update)


@pytest.mark.parametrize("make", [one_step, four_steps])
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
    compiled, donated, average = compile_step(one_step, tx, donate=donate)
    with pytest.raises(AssertionError, match="not all in place"):
        assert_in_place(compiled, donated=donated, average=average)
