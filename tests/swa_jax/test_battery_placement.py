"""Every average lives where it is told to, whatever it keeps of a leaf.

Eight CPU devices, Auto and Explicit axes. The oracle for values is the float64 average
of the models that entered; places are read off the arrays.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import swa_jax

from .test_placement import needs_host_memory
from .transformations import (
    Case,
    U,
    bits,
    counters,
    every_method,
    loop,
    make_step,
    trees,
    types,
)

#: The default run takes two cases of each test here, see conftest.py.
pytestmark = pytest.mark.sample(2)


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(request.param,))
    explicit = request.param == AxisType.Explicit
    with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
        yield mesh


def under(axes: AxisType):
    """Runs a test on this kind of mesh alone."""
    return pytest.mark.parametrize("mesh", [axes], ids=[axes.name], indirect=True)


def model(t: float = 1) -> dict[str, np.ndarray]:
    """A weight that divides by eight, a bias that does not, and a bfloat16 weight."""
    return {
        "w": np.arange(64, dtype=np.float32).reshape(16, 4) / 64 + t,
        "b": np.full(3, t, np.float32),
        "h": np.full((8, 2), t, jnp.bfloat16),
    }


def history(*numbers: int) -> list[dict]:
    return [model(t) for t in numbers]


def spread(mesh, kind: str | None = None):
    """The rule that a user would write."""

    def rule(leaf):
        divides = leaf.shape[:1] and leaf.shape[0] % 8 == 0
        target = NamedSharding(mesh, P("x") if divides else P())
        return target.with_memory_kind(kind) if kind else target

    return rule


#: Ways to say the same.
RULES: dict[str, Callable[[Any], Any]] = {
    "function": spread,
    "tree": lambda mesh: {
        "w": NamedSharding(mesh, P("x")),
        "b": None,
        "h": NamedSharding(mesh, P("x")),
    },
}


def assert_spread(state, parts: int = 8) -> None:
    """All that is kept of w and h lies in so many parts, none of them by its rows."""
    for tree in trees(state):
        for name, leaf in ((name, tree[name]) for name in ("w", "h")):
            shape = model()[name].shape
            expected = (*leaf.shape[: -len(shape)], shape[0] // parts, *shape[1:])
            assert {s.data.shape for s in leaf.addressable_shards} == {expected}


def everywhere(mesh, tree):
    return jax.device_put(tree, NamedSharding(mesh, P()))


@every_method
def test_spread_from_replicated_parameters(case, mesh):
    how = "tree" if mesh.axis_types == (AxisType.Explicit,) else "function"
    case = Case(case.method, {**case.options, "sharding": RULES[how](mesh)})
    tx = optax.chain(optax.sgd(1.0), case.make())
    params = everywhere(mesh, model(0))
    opt_state = (jax.jit(tx.init) if how == "function" else tx.init)(params)
    assert_spread(case.state(opt_state))
    grads = jax.tree.map(lambda x: -jnp.ones_like(x), params)
    step = jax.jit(make_step(tx, lambda _: grads), donate_argnums=1)
    for _ in range(7):
        params, opt_state = step(params, opt_state)
        assert_spread(case.state(opt_state))
        assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(params))
    assert tuple(map(int, counters(case.state(opt_state)))) == (7, 3)
    average = case.read(opt_state, params)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(average))
    case.assert_average(average, history(*range(1, 8)))


@every_method
@under(AxisType.Explicit)
def test_one_sharding_for_all(case, mesh):
    average = Case(case.method, {"sharding": NamedSharding(mesh, P("x"))}).make()
    params = {name: model()[name] for name in ("w", "h")}
    state = swa_jax.init_average(params, average)
    assert_spread(state)
    # A loop keeps it so, whatever the weights: whole, in NumPy, on another device.
    whole = everywhere(mesh, params)
    elsewhere = jax.device_put(params, jax.devices()[5])
    for weights in (whole, params, elsewhere):
        state = swa_jax.update_average(state, weights, average)
        assert_spread(state)
    assert bits(case.read(state, whole)) == bits(params)


@every_method
def test_weights_and_state_from_elsewhere(case):
    case = Case(case.method)
    average = case.make()
    expected = loop(average, history(1, 2, 5))
    state = loop(average, jax.device_put(history(1, 2), jax.devices()[3]))
    kinds = types(state)
    kept = jax.device_get(state)
    # From another device; a state as it is restored, in NumPy; both in NumPy.
    state = swa_jax.update_average(
        state, jax.device_put(model(5), jax.devices()[6]), average
    )
    assert {x.device.id for x in jax.tree.leaves(trees(state))} == {3}
    restored = swa_jax.update_average(
        kept, jax.device_put(model(5), jax.devices()[6]), average
    )
    assert {x.device.id for x in jax.tree.leaves(trees(restored))} == {6}
    plain = swa_jax.update_average(kept, model(5), average)
    for found in (state, restored, plain):
        assert bits(found) == bits(expected)
        assert types(found) == kinds


@every_method
def test_leaves_on_different_devices(case):
    case = Case(case.method)
    average = case.make()

    def scattered(t):
        return {
            name: jax.device_put(leaf, jax.devices()[number])
            for number, (name, leaf) in enumerate(model(t).items(), start=1)
        }

    expected = loop(average, history(1, 2, 5))
    state = loop(average, [scattered(t) for t in (1, 2, 5)])
    opt_state = average.init(scattered(1))
    for t in (1, 2, 5):
        zeros = jax.tree.map(lambda x: 0 * x, scattered(t))
        _, opt_state = average.update(zeros, opt_state, scattered(t))
    for found in (state, opt_state):
        # The same program leaf by leaf, which may divide or multiply by the inverse.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(
                np.asarray(a, np.float32), np.asarray(b, np.float32), atol=8 * 6 * U
            ),
            jax.device_get(found),
            jax.device_get(expected),
        )
        read = case.read(found, scattered(1))
        for tree in (*trees(found), read):
            for number, name in enumerate(model(), start=1):
                assert {x.device.id for x in jax.tree.leaves(tree[name])} == {number}
        case.assert_average(jax.device_get(read), history(1, 2, 5))


def kinds(tree) -> set[str]:
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


@needs_host_memory
@every_method
@under(AxisType.Auto)
def test_in_host_memory(case, mesh):
    rule = spread(mesh, "pinned_host")
    case = Case(case.method, {"sharding": rule})
    average = case.make()
    state = swa_jax.init_average(everywhere(mesh, model()), average)
    update = jax.jit(
        lambda state, params: swa_jax.update_average(state, params, average)
    )
    for number, t in enumerate((1, 2, 5)):
        params = everywhere(mesh, model(t))
        if number < 2:
            state = swa_jax.update_average(state, params, average)
        else:
            state = update(state, params)
        assert kinds(trees(state)) == {"pinned_host"}
        assert_spread(state)
    for read in (case.read, jax.jit(case.read)):
        found = read(state, params)
        assert kinds(found) == {"device"}
        case.assert_average(found, history(1, 2, 5))
    assert kinds(trees(state)) == {"pinned_host"}
    assert kinds(state.avg_params) <= {"pinned_host", "device"}


@every_method
@under(AxisType.Explicit)
def test_no_implicit_transfers(case, mesh):
    check_transfers(case, everywhere(mesh, model()))


@every_method
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf], ids=str)
def test_a_model_that_is_not_finite_on_one_device_alone_is_left_out(case, mesh, bad):
    # What one device finds the others must hear of: maxima between devices lose NaN.
    case = Case(case.method, {"skip_nonfinite": True})
    average = case.make()
    rule = spread(mesh)

    def lying(tree):
        return jax.tree.map(lambda x: jax.device_put(x, rule(x)), tree)

    state = swa_jax.init_average(lying(model(0)), average)
    opt_state, step = average.init(lying(model(0))), jax.jit(average.update)
    zeros = lying(jax.tree.map(np.zeros_like, model(0)))
    for t, (name, row) in enumerate([("", 0), ("w", 15), ("h", 3), ("", 0)], start=1):
        weights = model(t)
        if name:
            weights[name][row, 1] = bad
        state = swa_jax.update_average(state, lying(weights), average)
        _, opt_state = step(zeros, opt_state, lying(weights))
    for found in (state, opt_state):
        assert tuple(map(int, counters(found))) == (4, 2)
        read = jax.device_get(case.read(found, lying(model(4))))
        case.assert_average(read, history(1, 4))


@every_method
def test_no_implicit_transfers_of_numpy_arrays(case):
    check_transfers(case, model())


def check_transfers(case, params):
    options = {"start_step": 2, "skip_nonfinite": True}
    case = Case(case.method, options)
    average = case.make()
    zeros = jax.tree.map(lambda x: 0 * x, params)
    restored = jax.device_get(swa_jax.init_average(params, average))
    with jax.transfer_guard("disallow"):
        for state in (swa_jax.init_average(params, average), restored):
            for sample in (None, True, np.bool_(False)):
                state = swa_jax.update_average(state, params, average, sample=sample)
        opt_state = average.init(params)
        for _ in range(2):
            _, opt_state = average.update(zeros, opt_state, params)
        read = [case.read(each, params) for each in (state, opt_state)]
        moved = swa_jax.with_num_updates(opt_state, 7, case.method.state)
    assert tuple(map(int, counters(moved))) == (7, 1)
    for each in read:
        assert bits(each) == bits(model())
