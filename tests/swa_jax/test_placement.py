"""Where an average lives: beside sharded parameters, spread over devices, on the host.

Eight CPU devices, under Auto and Explicit mesh axes. Values are powers of two or their
sums over powers of two, hence exact whatever the order of operations: what can differ
is the place.
"""

import contextlib
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
)

import swa_jax

from ..compiled import assert_in_place, bytes_per_device, collectives

#: The default run takes two cases of each test here, see conftest.py.
pytestmark = pytest.mark.sample(2)

AXES = [AxisType.Auto, AxisType.Explicit]


@pytest.fixture(params=AXES, ids=["auto", "explicit"])
def mesh(request):
    """All eight devices in one axis, and the context that code for it runs in."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(request.param,))
    explicit = request.param == AxisType.Explicit
    with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
        yield mesh


def spread(mesh) -> NamedSharding:
    """The leading axis over all devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def everywhere(mesh) -> NamedSharding:
    """A copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def where_it_divides(mesh, memory_kind: str | None = None):
    """The rule that a user would write for any model."""

    def sharding(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        assert isinstance(leaf, jax.ShapeDtypeStruct)
        divides = leaf.shape and leaf.shape[0] % 8 == 0
        target = spread(mesh) if divides else everywhere(mesh)
        return target.with_memory_kind(memory_kind) if memory_kind else target

    return sharding


def model(value: float = 1.0) -> dict[str, np.ndarray]:
    """A weight that divides by eight, a bias that does not, and a bfloat16 weight."""
    return {
        "w": np.full((16, 4), value, np.float32),
        "b": np.full(3, 2 * value, np.float32),
        "h": np.full((8, 2), value, jnp.bfloat16),
    }


def shard(tree: Any, mesh) -> Any:
    """As fully sharded training does."""
    rule = where_it_divides(mesh)
    return jax.tree.map(
        lambda x: jax.device_put(x, rule(jax.ShapeDtypeStruct(x.shape, x.dtype))), tree
    )


def local_shapes(tree: Any) -> dict[str, set[tuple[int, ...]]]:
    """The shapes that devices really hold."""
    return {
        name: {s.data.shape for s in leaf.addressable_shards}
        for name, leaf in tree.items()
    }


WHOLE = {"w": {(16, 4)}, "b": {(3,)}, "h": {(8, 2)}}
SPREAD = {"w": {(2, 4)}, "b": {(3,)}, "h": {(1, 2)}}


def assert_placed_like(tree: Any, other: Any) -> None:
    """Same devices, same parts, same kind of memory."""

    def check(a, b):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)
        assert a.sharding.memory_kind == b.sharding.memory_kind

    jax.tree.map(check, tree, other)


def make_step(tx, gradient=lambda x: -jnp.ones_like(x)):
    """A training step; by default each update adds 1."""

    def step(params, opt_state):
        grads = jax.tree.map(gradient, params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def train(tx, params, *, steps: int = 3, jit_init: bool = True):
    """The parameters and the optimizer state after some steps, and the step."""
    opt_state = (jax.jit(tx.init) if jit_init else tx.init)(params)
    step = jax.jit(make_step(tx), donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, params)
    for _ in range(steps):
        params, opt_state = step(params, opt_state)
    return params, opt_state, step


def after(steps: int) -> dict[str, np.ndarray]:
    """The mean of the weights after updates 1 to ``steps``."""
    return jax.tree.map(lambda x: np.float32(x) + (steps + 1) / 2, model())


# Beside sharded parameters.


@pytest.mark.parametrize("jit", [False, True])
def test_average_is_created_where_the_parameters_are(mesh, jit):
    params = shard(model(), mesh)
    init = jax.jit(swa_jax.init_average) if jit else swa_jax.init_average
    state = init(params)
    assert_placed_like(state.avg_params, params)
    assert local_shapes(state.avg_params) == SPREAD


@pytest.mark.parametrize("jit_init", [False, True])
def test_average_stays_where_the_parameters_are(mesh, jit_init):
    start = shard(model(), mesh)
    tx = optax.chain(optax.sgd(1.0), swa_jax.swa())
    params, opt_state, _ = train(tx, start, jit_init=jit_init)
    average = swa_jax.swa_state(opt_state).avg_params
    assert_placed_like(params, start)
    assert_placed_like(average, start)
    chex.assert_trees_all_equal(jax.device_get(average), after(3))
    read = swa_jax.swa_params(opt_state, params)
    assert_placed_like(read, start)
    chex.assert_trees_all_equal_dtypes(read, params)


def test_sharded_averaging_is_in_place_and_silent(mesh):
    params = shard({"w": jnp.ones((512, 256)), "b": jnp.ones(3)}, mesh)
    state = jax.jit(swa_jax.init_average)(params)
    step = jax.jit(swa_jax.update_average, donate_argnums=0)
    compiled = step.lower(state, params).compile()
    assert_in_place(compiled, donated=state, average=state.avg_params)
    assert not collectives(compiled)


def test_swa_compiles_no_more_often_than_momentum(mesh):
    # JAX itself compiles a sharded step anew where the first outputs spell their
    # sharding otherwise than the inputs did. Momentum shows how often.
    momentum = optax.sgd(1.0, momentum=0.5)
    counts = [
        train(tx, shard(model(), mesh), steps=5)[2]._cache_size()
        for tx in (momentum, optax.chain(momentum, swa_jax.swa()))
    ]
    assert counts[1] <= counts[0]


def test_update_average_keeps_sharded_parameters_where_they_are(mesh):
    params = shard(model(1), mesh)
    state = swa_jax.init_average(params)
    for value in (1, 2, 6):
        state = swa_jax.update_average(state, shard(model(value), mesh))
    assert_placed_like(state.avg_params, params)
    expected = jax.tree.map(np.float32, model(3))
    chex.assert_trees_all_equal(jax.device_get(state.avg_params), expected)


# Spread over replicas.


@pytest.mark.parametrize(("how", "jit_init"), [("pytree", False), ("function", True)])
def test_average_spread_over_replicas(mesh, how, jit_init):
    rule = where_it_divides(mesh)
    tree = {"w": spread(mesh), "b": None, "h": spread(mesh)}
    tx = optax.chain(
        optax.sgd(1.0), swa_jax.swa(sharding=tree if how == "pytree" else rule)
    )
    start = jax.device_put(model(), everywhere(mesh))
    opt_state = (jax.jit(tx.init) if jit_init else tx.init)(start)
    assert local_shapes(swa_jax.swa_state(opt_state).avg_params) == SPREAD

    _, opt_state, _ = train(tx, start, jit_init=jit_init)
    average = swa_jax.swa_state(opt_state).avg_params
    assert local_shapes(average) == SPREAD
    # An eighth of w and h (float32 by then) and all of b: 4 bytes each.
    assert bytes_per_device(average) == 4 * (16 * 4 // 8 + 3 + 8 * 2 // 8)
    chex.assert_trees_all_equal(jax.device_get(average), after(3))

    read = swa_jax.swa_params(opt_state, start)
    assert_placed_like(read, start)
    assert local_shapes(read) == WHOLE
    chex.assert_trees_all_equal(jax.tree.map(np.float32, read), after(3))


def test_parameters_stay_whole_beside_a_spread_average(mesh):
    # Under Auto axes XLA likes to carry the average's sharding back into the weights:
    # then every step gathers them again.
    start = jax.device_put(model(), everywhere(mesh))
    plain = optax.sgd(1.0)
    tx = optax.chain(plain, swa_jax.swa(sharding=where_it_divides(mesh)))
    counts = []
    for each in (plain, tx):
        step = jax.jit(make_step(each, jnp.cos))
        opt_state = jax.jit(each.init)(start)
        assert_placed_like(step(start, opt_state)[0], start)
        compiled = step.lower(start, opt_state).compile()
        counts.append(collectives(compiled).total())
    assert counts == [0, 0]


def test_spread_average_is_in_place(mesh):
    params = jax.device_put(
        {"w": jnp.ones((512, 256)), "b": jnp.ones(3)}, everywhere(mesh)
    )
    tx = optax.chain(optax.sgd(1.0), swa_jax.swa(sharding=where_it_divides(mesh)))
    opt_state = jax.jit(tx.init)(params)
    # A gradient that costs something: XLA computes a constant one twice, and then needs
    # the old weights after they were overwritten, with swa() or without.
    step = jax.jit(make_step(tx, jnp.cos), donate_argnums=(0, 1))
    compiled = step.lower(params, opt_state).compile()
    average = swa_jax.swa_state(opt_state).avg_params
    # Measured by the parameters, of which the newcomer's slice is an eighth.
    assert_in_place(compiled, donated=(params, opt_state), average=params)
    assert bytes_per_device(average) < bytes_per_device(params) / 7


def test_single_sharding_holds_for_every_leaf(mesh):
    state = swa_jax.init_average(
        {"w": np.ones((8, 2)), "v": np.ones(16)}, sharding=spread(mesh)
    )
    assert local_shapes(state.avg_params) == {"w": {(1, 2)}, "v": {(2,)}}


def test_prefix_pytree(mesh):
    params = {
        "big": {"w": np.ones((8, 2)), "v": np.ones(8)},
        "small": {"b": np.ones(3)},
    }
    state = swa_jax.init_average(
        params, sharding={"big": spread(mesh), "small": everywhere(mesh)}
    )
    assert local_shapes(state.avg_params["big"]) == {"w": {(1, 2)}, "v": {(1,)}}
    assert local_shapes(state.avg_params["small"]) == {"b": {(3,)}}


def test_function_sees_the_dtype_of_the_average(mesh):
    seen = []
    swa_jax.init_average(model(), sharding=lambda leaf: seen.append(leaf))
    assert {(s.shape, s.dtype) for s in seen} == {
        ((16, 4), jnp.dtype("float32")),
        ((3,), jnp.dtype("float32")),
        ((8, 2), jnp.dtype("float32")),
    }


def test_none_leaves_a_leaf_beside_its_parameter(mesh):
    params = shard(model(), mesh)
    state = swa_jax.init_average(params, sharding=lambda leaf: None)
    assert_placed_like(state.avg_params, params)


def test_update_average_keeps_a_spread_average_spread(mesh):
    params = jax.device_put(model(), everywhere(mesh))
    state = swa_jax.init_average(params, sharding=where_it_divides(mesh))
    placed = jax.tree.map(jnp.copy, state.avg_params)
    for value in (1, 2, 6):
        new = jax.device_put(model(value), everywhere(mesh))
        state = swa_jax.update_average(state, new)
        assert_placed_like(state.avg_params, placed)
    expected = jax.tree.map(np.float32, model(3))
    chex.assert_trees_all_equal(jax.device_get(state.avg_params), expected)
    average = swa_jax.swa_params(state, params)
    chex.assert_trees_all_equal(jax.tree.map(np.float32, average), expected)
    assert_placed_like(average, params)


def test_swa_params_inside_jit_of_a_spread_average(mesh):
    params = jax.device_put(model(), everywhere(mesh))
    state = swa_jax.init_average(params, sharding=where_it_divides(mesh))
    state = swa_jax.update_average(state, params)
    read = jax.jit(swa_jax.swa_params)(state, params)
    chex.assert_trees_all_equal(jax.device_get(read), model())


def test_update_average_inside_jit_of_a_spread_average(mesh):
    params = jax.device_put(model(2), everywhere(mesh))
    state = swa_jax.init_average(params, sharding=where_it_divides(mesh))
    state = jax.jit(swa_jax.update_average)(state, params)
    assert local_shapes(state.avg_params) == SPREAD
    expected = jax.tree.map(np.float32, model(2))
    chex.assert_trees_all_equal(jax.device_get(state.avg_params), expected)


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
def test_update_average_with_unplaced_params(mesh, make):
    # NumPy arrays and arrays on the default device follow a spread average.
    state = swa_jax.init_average(
        jax.device_put(model(), everywhere(mesh)), sharding=where_it_divides(mesh)
    )
    for _ in range(2):
        state = swa_jax.update_average(state, jax.tree.map(make, model(2)))
    assert local_shapes(state.avg_params) == SPREAD
    expected = jax.tree.map(np.float32, model(2))
    chex.assert_trees_all_equal(jax.device_get(state.avg_params), expected)


def test_average_on_another_device():
    first, second = (SingleDeviceSharding(device) for device in jax.devices()[:2])
    params = jax.device_put(model(4), first)
    state = swa_jax.init_average(params, sharding=second)
    for _ in range(2):
        state = swa_jax.update_average(state, params)
    assert {x.sharding for x in jax.tree.leaves(state.avg_params)} == {second}
    read = swa_jax.swa_params(state, params)
    assert {x.sharding for x in jax.tree.leaves(read)} == {first}
    chex.assert_trees_all_equal(jax.device_get(read), model(4))


# optax's own view of a state, and leaves that it hides.


def layers() -> dict[str, Any]:
    """Two layers, for masks that hide leaves or whole layers."""
    return {
        "encoder": {"w": np.ones((8, 4), np.float32), "b": np.ones(3, np.float32)},
        "head": {"w": np.ones((8, 2), np.float32), "n": np.arange(3)},
    }


def layer_shardings(mesh) -> dict[str, Any]:
    """A sharding for each leaf of ``layers``."""
    return {
        "encoder": {"w": spread(mesh), "b": everywhere(mesh)},
        "head": {"w": spread(mesh), "n": None},
    }


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("how", ["none", "tree", "prefix", "function"])
def test_tree_map_params(mesh, how, compensated):
    sharding = {
        "none": None,
        "tree": layer_shardings(mesh),
        "prefix": {"encoder": everywhere(mesh), "head": everywhere(mesh)},
        "function": where_it_divides(mesh),
    }[how]
    swa = swa_jax.swa(sharding=sharding, compensated=compensated)
    tx = optax.chain(optax.adam(0.1), swa)
    specs = jax.tree.map(lambda x: f"spec of {x.shape}", layers())
    found = optax.tree_map_params(
        tx,
        lambda _, spec: spec,
        tx.init(layers()),
        specs,
        transform_non_params=lambda _: "no parameter",
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    state = swa_jax.swa_state(found[-1:])
    assert tuple(state) == ("no parameter", "no parameter", specs)
    if compensated:
        assert found[-1].compensation == specs


MASKS = {
    "leaf": {"encoder": {"w": True, "b": False}, "head": {"w": True, "n": False}},
    "subtree": {"encoder": False, "head": True},
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_pytree_of_shardings_under_masked(mesh, mask):
    tx = optax.masked(swa_jax.swa(sharding=layer_shardings(mesh)), mask)
    params = jax.device_put(layers(), everywhere(mesh))
    _, state = jax.jit(tx.update)(layers(), jax.jit(tx.init)(params), params)
    mean = swa_jax.swa_state(state).avg_params
    assert local_shapes({"w": mean["head"]["w"]}) == {"w": {(1, 2)}}
    np.testing.assert_array_equal(mean["head"]["w"], np.full((8, 2), 2.0))
    if mask["encoder"]:
        assert local_shapes({"w": mean["encoder"]["w"]}) == {"w": {(1, 4)}}
        assert mean["encoder"]["b"] == optax.MaskedNode()
    else:
        assert mean["encoder"] == optax.MaskedNode()

    specs = jax.tree.map(str, layer_shardings(mesh))
    specs["head"]["n"] = "none"
    seen = optax.tree_map_params(
        tx,
        lambda _, spec: spec,
        state,
        specs,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    assert swa_jax.swa_state(seen).avg_params["head"]["w"] == str(spread(mesh))


def test_shapes_give_an_average_with_their_sharding(mesh):
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        shard(model(), mesh),
    )
    state = swa_jax.swa().init(shapes)
    assert_placed_like(state.avg_params, shapes)
    assert local_shapes(state.avg_params) == SPREAD
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(state))


# Meshes of other kinds, and other devices.

PARTS = [
    PartitionSpec(),
    PartitionSpec("explicit"),
    PartitionSpec("auto"),
    PartitionSpec("explicit", "auto"),
    PartitionSpec(None, "auto"),
]


@pytest.mark.parametrize("average", PARTS, ids=str)
@pytest.mark.parametrize("parameters", PARTS, ids=str)
def test_mesh_with_axes_of_both_kinds(parameters, average):
    kinds = (AxisType.Explicit, AxisType.Auto)
    mesh = jax.make_mesh((4, 2), ("explicit", "auto"), axis_types=kinds)
    target = NamedSharding(mesh, average)
    values = np.arange(64, dtype=np.float32).reshape(8, 8)
    with jax.set_mesh(mesh):
        params = jax.device_put({"w": values}, NamedSharding(mesh, parameters))
        tx = optax.chain(optax.sgd(1.0), swa_jax.swa(sharding=target))
        _, opt_state, _ = train(tx, params)
        inside = swa_jax.swa_state(opt_state).avg_params["w"]
        state = swa_jax.init_average(params, sharding=target)
        for _ in range(2):
            state = swa_jax.update_average(state, params)
        read = swa_jax.swa_params(state, params)["w"]
    np.testing.assert_array_equal(inside, values + 2)
    for mean in (inside, state.avg_params["w"]):
        assert mean.sharding.is_equivalent_to(target, 2)
    np.testing.assert_array_equal(read, values)
    assert_placed_like(read, params["w"])


@pytest.mark.parametrize("average", [PartitionSpec(), PartitionSpec("data")], ids=str)
@pytest.mark.parametrize("axes", AXES)
def test_devices_in_another_order(axes, average):
    devices = np.array(jax.devices())
    mesh, other = (
        Mesh(order, ("data",), axis_types=(axes,)) for order in (devices, devices[::-1])
    )
    values = np.arange(16, dtype=np.float32)
    params = jax.device_put({"w": values}, spread(mesh))
    target = NamedSharding(other, average)
    state = swa_jax.init_average(params, sharding=target)
    tx = swa_jax.swa(sharding=target)
    opt_state = tx.init(params)
    for factor in (1, 3):
        model = jax.tree.map(lambda x, factor=factor: factor * x, params)
        state = swa_jax.update_average(state, model, sample=True)
        _, opt_state = tx.update(jax.tree.map(jnp.zeros_like, model), opt_state, model)
    for found in (state, opt_state):
        np.testing.assert_array_equal(found.avg_params["w"], 2 * values)
        assert found.avg_params["w"].sharding.is_equivalent_to(target, 1)
        assert_placed_like(swa_jax.swa_params(found, params), params)
    # The weights come from the other order instead.
    moved = jax.device_put(params, NamedSharding(other, PartitionSpec("data")))
    kept = swa_jax.update_average(swa_jax.init_average(params), moved)
    assert_placed_like(kept.avg_params, params)
    np.testing.assert_array_equal(kept.avg_params["w"], values)


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_leaves_on_different_devices(skip_nonfinite, compensated):
    """As in a pipeline, where no single compiled call could hold them all."""
    first, second = jax.devices()[1:3]
    params = {
        "a": jax.device_put(jnp.full(4, 1.0), first),
        "b": jax.device_put(jnp.full(3, 2.0), second),
        "n": jax.device_put(jnp.arange(3), second),
        "anywhere": jnp.full(2, 3.0),
    }
    state = swa_jax.init_average(params, compensated=compensated)
    tx = swa_jax.swa(skip_nonfinite=skip_nonfinite, compensated=compensated)
    opt_state = tx.init(params)
    zeros = jax.tree.map(lambda x: 0 * x, params)
    for factor in (1, 2, 6):
        model = jax.tree.map(lambda x, factor=factor: factor * x, params)
        old = state
        swa_jax.averaged_with(old, model)  # leaves it as it is
        state = swa_jax.update_average(old, model, skip_nonfinite=skip_nonfinite)
        assert all(x.is_deleted() for x in jax.tree.leaves(old))
        _, opt_state = tx.update(zeros, opt_state, model)
    expected = jax.tree.map(lambda x: 3 * np.asarray(x), params) | {"n": [0, 6, 12]}
    for found in (state, opt_state):
        assert int(found.num_averaged) == 3
        assert_placed_like(found.avg_params, params)
        for name, mean in found.avg_params.items():
            np.testing.assert_array_equal(mean, expected[name])
    with pytest.raises(RuntimeError, match="state has been donated"):
        swa_jax.update_average(old, params)


@pytest.mark.parametrize("leaves", ["sharded", "spread", "restored"])
def test_no_implicit_transfers(mesh, leaves):
    """Counters and restored arrays are moved explicitly, as the guard demands."""
    params = shard(model(), mesh)
    zeros = jax.tree.map(lambda x: 0 * x, params)
    rule = where_it_divides(mesh) if leaves == "spread" else None
    if leaves == "spread":
        params, zeros = jax.device_put((params, zeros), everywhere(mesh))
    tx = swa_jax.swa(2, skip_nonfinite=True, sharding=rule)
    restored = jax.device_get(swa_jax.init_average(params))
    with jax.transfer_guard("disallow"):
        state = restored
        if leaves != "restored":
            state = swa_jax.init_average(params, sharding=rule)
        for sample in (None, True, np.bool_(False)):
            state = swa_jax.update_average(state, params, sample=sample)
        opt_state = tx.init(params)
        for _ in range(3):
            _, opt_state = tx.update(zeros, opt_state, params)
    for found in (state, opt_state):
        assert int(found.num_averaged) == 2
        assert local_shapes(found.avg_params) == SPREAD
        chex.assert_trees_all_equal(jax.device_get(found.avg_params), model())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_what_is_not_finite_is_seen_in_any_shard(dtype):
    """Maxima over devices drop NaN, and every shard is on another device."""
    devices = Mesh(np.array(jax.devices()), ("d",))
    spread = NamedSharding(devices, PartitionSpec("d"))
    good = jax.device_put(jnp.arange(16, dtype=dtype), spread)
    tx = swa_jax.swa(skip_nonfinite=True)
    step = jax.jit(lambda state, q: tx.update(q, state, jnp.zeros_like(q))[1])
    for place in range(0, 16, 2):
        bad = (np.nan, np.inf, -np.inf)[place % 3]
        wrong = jax.device_put(good.at[place].set(bad), spread)
        state, opt_state = swa_jax.init_average(good), tx.init(good)
        for q in (good, wrong):
            state = swa_jax.update_average(state, q, skip_nonfinite=True)
            opt_state = step(opt_state, q)
        for found in (state, opt_state):
            assert (int(found.num_updates), int(found.num_averaged)) == (2, 1)
            np.testing.assert_array_equal(found.avg_params, np.arange(16))


# Host memory.

needs_host_memory = pytest.mark.skipif(
    jax.__version_info__ < (0, 10, 2), reason="older JAX crashes on the transfer"
)


@pytest.mark.skipif(
    jax.__version_info__ >= (0, 10, 2), reason="this JAX can use host memory"
)
@pytest.mark.parametrize("make", ["init_average", "swa"])
def test_host_memory_is_refused_where_jax_crashes(make):
    host = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    init = swa_jax.swa(sharding=host).init
    if make == "init_average":
        init = functools.partial(swa_jax.init_average, sharding=host)
    with pytest.raises(ValueError, match=r"host memory needs jax >= 0.10.2, this is 0"):
        init(model())


@needs_host_memory
def test_average_in_host_memory(mesh):
    rule = where_it_divides(mesh, "pinned_host")
    params = jax.device_put(model(), everywhere(mesh))
    state = swa_jax.init_average(params, sharding=rule)
    placed = jax.tree.map(lambda x: x.sharding, state.avg_params)
    for value in (1, 2, 6):
        new = jax.device_put(model(value), everywhere(mesh))
        state = swa_jax.update_average(state, new)
        for name, leaf in state.avg_params.items():
            assert leaf.sharding.memory_kind == "pinned_host"
            assert leaf.sharding.is_equivalent_to(placed[name], leaf.ndim)
    assert local_shapes(state.avg_params) == SPREAD
    assert int(state.num_averaged) == 3
    read = swa_jax.swa_params(state, params)
    assert_placed_like(read, params)
    expected = jax.tree.map(np.float32, model(3))
    chex.assert_trees_all_equal(jax.tree.map(np.float32, read), expected)
    # Read twice: the first reading moved nothing.
    swa_jax.swa_params(state, params)
    assert {x.sharding.memory_kind for x in state.avg_params.values()} == {
        "pinned_host"
    }


@needs_host_memory
def test_average_in_host_memory_inside_jit(mesh):
    """There it computes on the devices, and the state stays in host memory."""
    rule = where_it_divides(mesh, "pinned_host")
    params = jax.device_put(model(), everywhere(mesh))
    state = swa_jax.init_average(params, sharding=rule)
    for value in (1, 5):
        new = jax.device_put(model(value), everywhere(mesh))
        state = jax.jit(swa_jax.update_average)(state, new)
    kinds = {x.sharding.memory_kind for x in state.avg_params.values()}
    assert kinds == {"pinned_host"}
    read = jax.jit(swa_jax.swa_params)(state, params)
    assert {x.sharding.memory_kind for x in read.values()} == {"device"}
    chex.assert_trees_all_equal(
        jax.tree.map(np.float32, read), jax.tree.map(np.float32, model(3))
    )


@needs_host_memory
@pytest.mark.parametrize("compensated", [False, True])
def test_average_in_host_memory_of_one_device(compensated):
    host = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    state = swa_jax.init_average(model(), sharding=host, compensated=compensated)
    for value in (2, 4):
        state = swa_jax.update_average(state, model(value))
    hosted = (state.avg_params, state.compensation if compensated else {})
    assert {x.sharding.memory_kind for x in jax.tree.leaves(hosted)} == {"pinned_host"}
    read = swa_jax.swa_params(state, model())
    chex.assert_trees_all_equal(jax.device_get(read), model(3))


# Bad input.


@pytest.mark.parametrize(
    ("sharding", "error", "message"),
    [
        ("data", TypeError, r"sharding must be .*got str: 'data'"),
        (PartitionSpec("data"), TypeError, r"sharding must be a jax.sharding.Sharding"),
        ({"w": "data", "b": None, "h": None}, TypeError, r"got str: 'data'"),
        (lambda leaf: leaf.shape, TypeError, r"sharding must be .*got tuple: \("),
        ({"w": None}, ValueError, r"sharding: .*structure of params .or be a prefix"),
        ([None, None], ValueError, r"sharding: .*structure of params"),
    ],
)
@pytest.mark.parametrize("make", ["init_average", "swa"])
def test_refused_shardings(sharding, error, message, make):
    init = swa_jax.swa(sharding=sharding).init
    if make == "init_average":
        init = functools.partial(swa_jax.init_average, sharding=sharding)
    with pytest.raises(error, match=f"(?s){message}"):
        init(model())


@pytest.mark.parametrize("make", ["init_average", "swa"])
def test_sharding_that_does_not_divide_names_the_leaf(mesh, make):
    init = swa_jax.swa(sharding=spread(mesh)).init
    if make == "init_average":
        init = functools.partial(swa_jax.init_average, sharding=spread(mesh))
    message = r"(?s)does not divide params\['b'\] of shape \(3,\).*Fix: pass a function"
    with pytest.raises(ValueError, match=message):
        init({"a": np.ones(8), "b": np.ones(3)})


def test_mesh_is_no_sharding(mesh):
    with pytest.raises(TypeError, match=r"got the Mesh alone; pass .*NamedSharding"):
        swa_jax.init_average(model(), sharding=mesh)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["shard_map", "pmap"])
def test_sharding_inside_a_per_device_program_is_refused(how):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx = swa_jax.swa(sharding=spread(mesh))
    params = {"w": jnp.ones(16)}
    state = tx.init(params)

    def step(params, state):
        return tx.update(params, state, params)

    if how == "shard_map":
        whole = PartitionSpec()
        mapped = jax.shard_map(step, mesh=mesh, in_specs=whole, out_specs=whole)
    else:
        mapped = jax.pmap(lambda i, *args: step(*args), in_axes=(0, None, None))
        mapped = functools.partial(mapped, jnp.arange(8))
        state = jax.device_get(state)
    with pytest.raises(
        ValueError, match=r"no meaning inside .*Fix: leave sharding out"
    ):
        mapped(params, state)


def test_sharding_over_an_axis_that_the_compiler_keeps():
    """Partly manual: `model` is the program's own, `data` is the compiler's."""
    auto = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((2, 4), ("model", "data"), axis_types=auto)
    target = NamedSharding(mesh, PartitionSpec("data"))
    tx = swa_jax.swa(sharding=target)
    params = jax.device_put({"w": jnp.arange(16.0)}, everywhere(mesh))

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        axis_names={"model"},
        check_vma=False,
    )
    def step(params, state):
        return tx.update(jax.tree.map(jnp.ones_like, params), state, params)[1]

    state = step(params, tx.init(params))
    np.testing.assert_array_equal(state.avg_params["w"], np.arange(16.0) + 1)
