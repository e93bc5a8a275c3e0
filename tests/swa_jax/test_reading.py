"""``swa_state`` and ``swa_params``: finding the average, and what comes out."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import swa_jax

from .test_transform import PARAMS, bits, follow

# Where the state is found.


def test_swa_state_in_plain_containers():
    state = swa_jax.swa().init({"w": jnp.ones(2)})
    for nested in (state, (state,), {"a": [1, (state, None)]}):
        assert swa_jax.swa_state(nested) == state


@pytest.mark.parametrize(
    "opt_state", [(), None, optax.adam(0.1).init(jnp.ones(2)), {"w": jnp.ones(2)}]
)
def test_no_state_is_an_error(opt_state):
    name = type(opt_state).__name__
    message = rf"opt_state \(a {name}\) holds no SWAState; chain swa_jax.swa\("
    with pytest.raises(ValueError, match=message):
        swa_jax.swa_state(opt_state)
    with pytest.raises(ValueError, match=message):
        swa_jax.swa_params(opt_state, jnp.ones(2))


def test_several_states_are_an_error():
    params = {"w": jnp.ones(2)}
    tx = optax.chain(swa_jax.swa(), optax.named_chain(("late", swa_jax.swa(9))))
    message = (
        r"holds 2 SWAStates, where one was expected: opt_state\[0\], "
        r"opt_state\[1\]\['late'\]; pass the part"
    )
    with pytest.raises(ValueError, match=message):
        swa_jax.swa_state(tx.init(params))
    with pytest.raises(ValueError, match=message):
        swa_jax.swa_params(tx.init(params), params)
    assert swa_jax.swa_state(tx.init(params)[1]).num_updates == 0


# Values.


@pytest.mark.parametrize("jit", [False, True])
def test_swa_params_before_and_after_the_first_model(jit):
    read = jax.jit(swa_jax.swa_params) if jit else swa_jax.swa_params
    tx = swa_jax.swa(start_step=2)
    models = [{"w": np.array([x, 0.25, np.nan], np.float32)} for x in (1, 2, 4)]
    states = follow(tx.init(models[0]), tx, models)
    assert bits(read(tx.init(models[0]), models[0])) == bits(models[0])
    assert bits(read(states[0], models[0])) == bits(models[0])
    assert bits(read(states[1], models[0])) == bits(models[1])
    expected = {"w": np.array([3, 0.25, np.nan], np.float32)}
    chex.assert_trees_all_equal(read(states[2], models[0]), expected)
    negative_zero = {"w": -np.zeros(3, np.float32)}
    assert bits(read(tx.init(models[0]), negative_zero)) == bits(negative_zero)


def test_swa_params_have_the_params_dtypes():
    dtypes = [jnp.bfloat16, jnp.float16, jnp.float8_e5m2, jnp.float32, jnp.complex64]
    params = {jnp.dtype(dtype).name: jnp.ones((2, 2), dtype) for dtype in dtypes}
    params["weak"] = jnp.asarray(1.0)
    tx = swa_jax.swa()
    models = [params, jax.tree.map(lambda x: x + x + x, params)]
    state = follow(tx.init(params), tx, models)[-1]
    read = swa_jax.swa_params(state, params)
    expected = jax.tree.map(lambda x: x + x, params)  # the mean of 1 and 3
    chex.assert_trees_all_equal(read, expected)
    chex.assert_trees_all_equal_dtypes(read, expected)


@pytest.mark.parametrize("num_averaged", [0, 3])
@pytest.mark.parametrize("jit", [False, True])
def test_swa_params_share_no_buffer_with_the_state(num_averaged, jit):
    read = jax.jit(swa_jax.swa_params) if jit else swa_jax.swa_params
    params = {"w": jnp.ones(64), "h": jnp.ones(64, jnp.bfloat16), "n": jnp.arange(3)}
    state = swa_jax.init_average(params)
    for _ in range(num_averaged):
        state = swa_jax.update_average(state, params)
    average = read(state, params)
    own = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)}
    assert not own & {x.unsafe_buffer_pointer() for x in jax.tree.leaves(average)}
    # The state goes on, in place; what was read stays as it was.
    jax.jit(lambda s: jax.tree.map(lambda x: 0 * x, s), donate_argnums=0)(state)
    chex.assert_trees_all_equal(average, params)


def test_swa_params_do_not_touch_the_state():
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    state = swa_jax.update_average(swa_jax.init_average(params), params)
    before = bits(state)
    swa_jax.swa_params(state, params)
    assert not any(x.is_deleted() for x in jax.tree.leaves((state, params)))
    assert bits(state) == before


def test_swa_params_ignore_the_values_of_params():
    params = {"w": jnp.ones(4)}
    state = swa_jax.update_average(swa_jax.init_average(params), params)
    read = swa_jax.swa_params(state, {"w": jnp.full(4, jnp.nan)})
    chex.assert_trees_all_equal(read, params)


def test_swa_params_with_abstract_shapes():
    # As for restoring a checkpoint: nothing is computed.
    params = {"w": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)}
    state = jax.eval_shape(swa_jax.init_average, params)
    assert state.avg_params["w"].dtype == jnp.float32
    read = jax.eval_shape(swa_jax.swa_params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(read, params)


@pytest.mark.parametrize("wrap", [jax.vmap, jax.pmap])
def test_leading_axes(wrap):
    # Four runs, of which each has come so far: 0, 1, 2 or 3 models averaged.
    params = {"w": jnp.arange(8.0).reshape(4, 2), "h": jnp.ones((4, 3), jnp.bfloat16)}
    tx = optax.chain(optax.sgd(0.1), swa_jax.swa())
    opt_state = wrap(tx.init)(params)
    state = swa_jax.swa_state(opt_state)
    state = state._replace(
        num_averaged=jnp.arange(4, dtype=jnp.int32),
        avg_params={"w": 10 + params["w"], "h": jnp.full((4, 3), 5.0)},
    )
    outside = swa_jax.swa_params(state, params)
    inside = wrap(swa_jax.swa_params)(state, params)
    expected = {
        "w": np.array([[0, 1], [12, 13], [14, 15], [16, 17]], np.float32),
        "h": np.array([[1] * 3] + [[5] * 3] * 3, jnp.bfloat16),
    }
    for read in (outside, inside):
        chex.assert_trees_all_equal(jax.device_get(read), expected)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"a": jnp.ones((2, 3))},
            r"averages a parameter \['b'\]\['c'\], which params lacks",
        ),
        (
            {**PARAMS, "d": jnp.ones(())},
            r"for params\['d'\] of shape \(\) opt_state holds no average",
        ),
        (
            {**PARAMS, "a": jnp.ones((2, 1))},
            r"for params\['a'\] of shape \(2, 1\) .* an average of shape \(2, 3\)",
        ),
    ],
)
def test_swa_params_refuse_another_model(params, message):
    state = swa_jax.init_average(PARAMS)
    with pytest.raises(
        ValueError, match=rf"swa_params: .*{message}.*pass the parameters that the opt"
    ):
        swa_jax.swa_params(state, params)
