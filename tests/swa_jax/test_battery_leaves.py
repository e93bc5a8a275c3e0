"""What every average must stand, leaf by leaf: many models, many dtypes, and no model.

From a transformation and from a loop. ``transformations.METHODS`` says what is tested,
and its oracle is the float64 average of the models that entered.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import swa_jax
from swa_jax.typing import Sample

from .transformations import (
    Case,
    bits,
    counters,
    every_method,
    structure,
    trees,
    types,
)

#: The default run takes two cases of each test here, see conftest.py.
pytestmark = pytest.mark.sample(2)

# Many models.


@every_method
def test_many_models(case):
    case = Case(case.method)
    average, total = case.make(), 500
    rng = np.random.default_rng(0)
    first = rng.normal(1, 0.1, size=(4, 3))
    start = {
        "f32": jnp.asarray(first, jnp.float32),
        "bf16": jnp.asarray(first, "bfloat16"),
    }

    def step(carry, noise):
        params, state = carry
        updates = jax.tree.map(lambda x: (noise - 0.1 * x).astype(x.dtype), params)
        _, state = average.update(updates, state, params)
        params = optax.apply_updates(params, updates)
        mean = jax.tree.map(lambda x: x.astype(jnp.float32), state.avg_params)
        return (params, state), (params, mean)

    noise = jnp.asarray(rng.normal(0.1, 0.1, size=(total, 4, 3)), jnp.float32)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, noise))
    (params, state), stored = jax.device_get(run((start, average.init(start))))
    assert {x.dtype for x in jax.tree.leaves(state.avg_params)} == {np.dtype("float32")}
    models, means = (
        [jax.tree.map(lambda x, t=t: x[t], tree) for t in range(total)]
        for tree in stored
    )
    for n in (5, 50, total):
        # Kept in float32 also beside bfloat16 weights, of a last place 2^16 as large:
        # so it is compared as it is kept, before reading rounds it to theirs.
        expected = case.expected(models[:n])
        largest = max(
            float(np.abs(np.asarray(x, np.float64)).max())
            for x in jax.tree.leaves(models[:n])
        )
        for name, mean in means[n - 1].items():
            np.testing.assert_allclose(
                mean,
                expected[name],
                rtol=0,
                atol=largest * case.error(n),
                err_msg=f"{n} {name}",
            )
    case.assert_run(params, state, models)


# Trees with leaves of every kind.


def tree(t: int) -> dict:
    """The t-th model: weights that no sum of few rounds, and what is no weight."""
    steps = np.arange(8) % 4 / 4
    return {
        "f32": np.asarray(t + steps, np.float32).reshape(2, 4),
        "bf16": np.asarray(t + steps, ml_dtypes.bfloat16),
        "f8": np.asarray(t + 2 * steps, ml_dtypes.float8_e4m3fn),
        "complex": np.asarray(t + 1j * steps, np.complex64),
        "int": np.asarray(t * np.arange(3), np.int32),
        "flag": np.asarray([t % 2 == 0, True]),
        "key": jax.random.key(t),
        "empty": np.zeros((0, 2), np.float32),
        "none": None,
        "hidden": optax.MaskedNode(),
        "inside": [None, {"scalar": np.float32(t)}],
    }


def nothing(tree: dict) -> dict:
    """Updates that leave a tree as it is."""
    updates = jax.tree.map(np.zeros_like, {**tree, "key": np.zeros(())})
    return {**updates, "key": np.zeros((), jax.dtypes.float0)}


def without_keys(tree: dict) -> dict:
    """The same with the keys' words."""
    return {**tree, "key": np.asarray(jax.random.key_data(tree["key"]))}


def assert_tree(case: Case, average: dict, models: list[dict]) -> None:
    """``average`` as it is read, of what entered."""
    history = [without_keys(model) for model in models]
    assert structure(average) == structure(models[0])
    Case(case.method).assert_average(without_keys(average), history)


@every_method
def test_leaves_of_every_kind_in_a_transformation(case):
    tx = case.make()
    update, state = jax.jit(tx.update), tx.init(tree(0))
    expected = types(state)
    for t in range(1, 9):
        _, state = update(nothing(tree(t)), state, tree(t))
        assert types(state) == expected
    assert tuple(map(int, counters(state))) == (8, 3)
    assert_tree(case, jax.jit(case.read)(state, tree(8)), list(map(tree, (3, 5, 7))))


@every_method
def test_leaves_of_every_kind_from_a_loop(case):
    average = Case(case.method).make()
    state = swa_jax.init_average(tree(0), average)
    expected = types(state)
    for t in range(1, 9):
        sample = t in (2, 3, 7)
        state = swa_jax.update_average(state, tree(t), average, sample=sample)
        assert types(state) == expected
    assert tuple(map(int, counters(state))) == (8, 3)
    assert_tree(case, case.read(state, tree(8)), list(map(tree, (2, 3, 7))))


@every_method
def test_hidden_leaves(case):
    # As optax.masked hides them, a leaf and a whole subtree.
    mask: dict[str, Any]
    mask = {name: name not in ("f32", "int", "inside") for name in tree(0)}
    mask |= {"none": None, "hidden": optax.MaskedNode()}
    tx = optax.masked(case.make(), mask)
    update, state = jax.jit(tx.update), tx.init(tree(0))
    for t in range(1, 9):
        _, state = update(nothing(tree(t)), state, tree(t))
    average = case.read(state, tree(8))
    for name in ("f32", "int", "inside"):
        assert bits(average[name]) == bits(tree(8)[name])
    visible = {name: leaf for name, leaf in average.items() if mask[name] is True}
    models = [{name: tree(t)[name] for name in visible} for t in (3, 5, 7)]
    assert_tree(case, visible, models)


# No model: every bit stays.


#: NaN, quiet and signalling and with a sign, -0, the smallest subnormal, infinity. For
#: a choice between numbers in bfloat16, XLA for CPUs makes float32 of them and back, in
#: which a NaN loses all but its sign.
PATTERNS = {
    "float8_e4m3fn": [0x7F, 0xFF, 0x80, 0x01, 0x7E],
    "bfloat16": [0x7FC0, 0xFFC0, 0x8000, 0x0001, 0x7F80],
    "float16": [0x7E05, 0xFC05, 0x8000, 0x0001, 0x7C00],
    "float32": [0x7FC12345, 0xFF812345, 0x80000000, 0x00000001, 0x7F800000],
}


def odd(x: jax.Array) -> jax.Array:
    """An array like ``x`` of bits that arithmetic does not keep."""
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    part = jnp.finfo(x.dtype).dtype
    words = np.array(PATTERNS[part.name], f"uint{8 * part.itemsize}")
    values = np.resize(words, x.size * x.dtype.itemsize // part.itemsize)
    return jnp.asarray(values.view(x.dtype).reshape(x.shape))


def odd_state(average, params):
    """A state of three models in which every number is odd."""
    state = swa_jax.init_average(params, average)
    (_, _, *leaves), treedef = jax.tree.flatten(state)  # two counters come first
    counted = [jnp.int32(3), jnp.int32(3)]
    return jax.tree.unflatten(treedef, [*counted, *map(odd, leaves)])


def raw(tree) -> list[bytes]:
    """``bits``, of keys too."""
    keys = jax.dtypes.prng_key
    is_key = lambda x: jnp.issubdtype(x.dtype, keys)  # noqa: E731
    return bits(
        [jax.random.key_data(x) if is_key(x) else x for x in jax.tree.leaves(tree)]
    )


SMALL = ("f32", "bf16", "f8", "complex", "int", "key")


def small(t: int) -> dict:
    return {name: tree(t)[name] for name in SMALL}


def of_nan() -> dict:
    """A model of nothing but NaN, whose integers and keys differ as well."""

    def spoil(leaf):
        weight = jnp.issubdtype(leaf.dtype, jnp.inexact)
        return np.full_like(leaf, np.nan) if weight else leaf

    return jax.tree.map(spoil, small(9))


@every_method
@pytest.mark.parametrize("accumulator", [None, jnp.bfloat16], ids=["wide", "bfloat16"])
def test_a_skipped_model_leaves_every_bit(case, accumulator):
    options = {"start_step": 4, "period": 2, "stop_step": 6, "skip_nonfinite": True}
    average = Case(case.method, {**options, "accumulator_dtype": accumulator}).make()
    state = odd_state(average, small(1))  # after update 3
    expected = raw(state)
    skipped: dict[int, tuple[dict, Sample]] = {
        4: (of_nan(), True),  # not finite
        5: (small(2), True),  # between two of the period
        6: (small(2), False),  # not asked for
        7: (of_nan(), True),
        8: (small(2), jnp.array(True)),  # behind the end
    }
    for number, (params, sample) in skipped.items():
        state = swa_jax.update_average(state, params, average, sample=sample)
        assert tuple(map(int, counters(state))) == (number, 3)
        assert raw(state)[1:] == expected[1:]


@every_method
def test_a_skipped_update_leaves_every_bit(case):
    average = Case(case.method, {"start_step": 1, "period": 100}).make()
    params = {name: leaf for name, leaf in of_nan().items() if name != "key"}
    state = odd_state(average, params)
    expected = raw(state)
    zeros = jax.tree.map(jnp.zeros_like, params)

    def body(state, _):
        return average.update(zeros, state, params)[1], None

    @functools.partial(jax.jit, donate_argnums=0)
    def scan(state):
        return jax.lax.scan(body, state, length=3)[0]

    state = scan(body(state, None)[0])  # eagerly, and donated
    assert tuple(map(int, counters(state))) == (7, 3)
    assert raw(state)[1:] == expected[1:]


def test_a_newcomer_leaves_other_models_of_a_window_their_bits():
    average = swa_jax.lawa(4)
    state = odd_state(average, small(1))
    new = swa_jax.averaged_with(state, small(5), average)
    for row in range(4):
        kept, found = (
            raw(jax.tree.map(lambda x, row=row: x[row], each.window))
            for each in (state, new)
        )
        # The fourth model is written to row 3.
        assert found == (raw(small(5)) if row == 3 else kept)


# Models that are not finite.


BAD = {
    "f32": np.nan,
    "bf16": np.inf,
    "f8": np.nan,
    "complex": complex(1, np.nan),
}


def spoilt(t: int, name: str) -> dict:
    leaf = np.array(tree(t)[name])
    leaf[(0,) * leaf.ndim] = BAD[name]
    return {**tree(t), name: leaf}


@every_method
def test_models_that_are_not_finite_are_left_out(case):
    average = Case(case.method, {"skip_nonfinite": True}).make()
    update, state = jax.jit(average.update), average.init(tree(0))
    for t, name in enumerate([None, *BAD, None, None], start=1):
        model = tree(t) if name is None else spoilt(t, name)
        _, state = update(nothing(model), state, model)
    last = len(BAD) + 3
    assert tuple(map(int, counters(state))) == (last, 3)
    models = [tree(t) for t in (1, last - 1, last)]
    assert_tree(case, case.read(state, tree(last)), models)


@every_method
def test_the_first_model_is_exact_whatever_was_there_before(case):
    # Also the second: nothing of the initial weights is left in any part of the state.
    average = Case(case.method).make()
    for bad in (3e38, np.nan, np.inf):
        start = jax.tree.map(lambda x, v=bad: jnp.full_like(x, v), {"w": jnp.ones(3)})
        state = swa_jax.init_average(start, average)
        for n, x in enumerate((0.1, 0.7), start=1):
            model = {"w": jnp.full(3, x)}
            state = swa_jax.update_average(state, model, average)
            assert all(np.isfinite(x).all() for x in reached(state, n))
        fresh = swa_jax.init_average({"w": jnp.zeros(3)}, average)
        for x in (0.1, 0.7):
            fresh = swa_jax.update_average(fresh, {"w": jnp.full(3, x)}, average)
        assert bits(case.read(state, model)) == bits(case.read(fresh, model))


def reached(state, n: int) -> list[np.ndarray]:
    """What has a meaning after n models: of a stack the rows that they reached."""
    leaves = map(np.asarray, jax.tree.leaves(trees(state)))
    return [x[:n] if x.ndim > 1 else x for x in leaves]


@every_method
def test_numbers_and_numpy_arrays_will_do(case):
    average = Case(case.method).make()
    models = [{"a": float(t), "b": [np.float32(t), t], "c": np.ones(2)} for t in (1, 3)]
    state = swa_jax.init_average(models[0], average)
    same = swa_jax.init_average(jax.tree.map(jnp.asarray, models[0]), average)
    assert types(state) == types(same)
    for model in models:
        state = swa_jax.update_average(state, model, average)
    history = [jax.tree.map(jnp.asarray, model) for model in models]
    Case(case.method).assert_average(case.read(state, models[1]), history)
