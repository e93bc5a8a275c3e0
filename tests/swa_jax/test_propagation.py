"""A spread average leaves the parameters, and the step's communication, as they were.

Under Auto mesh axes, where XLA infers shardings, on eight CPU devices. The training
step with ``swa(sharding=...)`` is compiled beside the same step without it.
"""

from collections import Counter
from typing import Any, NamedTuple

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import swa_jax
from swa_jax._placement import _moves, stop_propagation

from ..compiled import collectives

#: The default run takes two cases of each test here, see conftest.py.
pytestmark = pytest.mark.sample(2)

P = PartitionSpec
WEIGHTS, ROWS, COLUMNS, BATCH = 3, 64, 16, 32


class Layout(NamedTuple):
    """How a model lies on a mesh, and where its average shall be."""

    mesh: dict[str, int]
    params: PartitionSpec
    average: PartitionSpec
    parts: int  # into which the average is divided

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        types = (AxisType.Auto,) * len(self.mesh)
        sizes, names = tuple(self.mesh.values()), tuple(self.mesh)
        return NamedSharding(jax.make_mesh(sizes, names, axis_types=types), spec)


ONE, TWO = {"data": 8}, {"data": 4, "model": 2}
BOTH = P(("data", "model"))
#: The average lies where the parameters do, only thinner.
THINNER = {
    "replicated": Layout(ONE, P(), P("data"), 8),
    "2d-replicated": Layout(TWO, P(), P("data"), 4),
    "2d-replicated-to-both": Layout(TWO, P(), BOTH, 8),
    "2d-tensor-parallel": Layout(TWO, P(None, "model"), P("data", "model"), 8),
    "2d-fsdp-to-both": Layout(TWO, P("data"), BOTH, 8),
}
#: The average lies where the parameters do.
ALIKE = {
    "fsdp": Layout(ONE, P("data"), P("data"), 8),
    "2d-fsdp": Layout(TWO, P("data"), P("data"), 4),
    "2d-fsdp-tensor-parallel": Layout(TWO, P("data", "model"), P("data", "model"), 8),
}


class Compiled(NamedTuple):
    """What matters of a compiled step, and of what it returned."""

    collectives: Counter[str]
    params: dict[str, jax.Array]
    opt_state: Any


def loss_fn(params, batch):
    return sum(jnp.tanh(batch @ w).mean() for w in params.values())


def compile_and_run(layout: Layout, average: Any = None, *, pinned: bool) -> Compiled:
    """One step of SGD with momentum, and with ``average`` behind it if given.

    ``pinned``: the user tells jit where the outputs shall be, the parameters' and the
    momentum's sharding being what it was.
    """
    beside = layout.sharding(layout.params)
    base = optax.sgd(0.1, momentum=0.9)
    rng = np.random.default_rng(0)

    def weight():
        return rng.standard_normal((ROWS, COLUMNS), dtype=np.float32)

    params = jax.device_put({f"w{i}": weight() for i in range(WEIGHTS)}, beside)
    batch = np.ones((BATCH, ROWS), np.float32)
    batch = jax.device_put(batch, layout.sharding(P("data")))
    tx, opt_state = base, jax.device_put(base.init(params), beside)
    if average:
        tx, opt_state = optax.chain(base, average), (opt_state, average.init(params))

    def step(params, opt_state, batch):
        grads = jax.grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    # A new function each time: nothing is found in a cache that another test filled.
    how = {}
    if pinned:
        everywhere = layout.sharding(P())
        how["out_shardings"] = jax.tree.map(
            lambda x: x.sharding if x.ndim else everywhere, (params, opt_state)
        )
    jitted = jax.jit(step, donate_argnums=(0, 1), **how)
    compiled = jitted.lower(params, opt_state, batch).compile()
    return Compiled(collectives(compiled), *jitted(params, opt_state, batch))


def assert_untouched(layout: Layout, *, pinned: bool) -> None:
    """The step with a spread average is, but for the average, the step without."""
    target = layout.sharding(layout.average)
    base = compile_and_run(layout, pinned=pinned)
    swa = compile_and_run(layout, swa_jax.swa(1, 5, sharding=target), pinned=pinned)

    own = layout.sharding(layout.params)
    for params in (base.params, swa.params):
        for w in params.values():
            assert w.sharding.is_equivalent_to(own, w.ndim), f"moved to {w.sharding}"
    assert swa.collectives == base.collectives

    average = swa_jax.swa_state(swa.opt_state).avg_params
    assert len(average) == WEIGHTS
    for mean in average.values():
        assert len(mean.addressable_shards) == 8
        for shard in mean.addressable_shards:
            assert shard.data.nbytes == ROWS * COLUMNS * 4 // layout.parts
    # The first update was averaged: the mean is the weights themselves. They are not
    # compared with those of the other step, which XLA may round otherwise.
    chex.assert_trees_all_equal(jax.device_get(average), jax.device_get(swa.params))


def parametrize(layouts: dict[str, Layout]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("layout", layouts.values(), ids=layouts)


@parametrize(THINNER | ALIKE)
@pytest.mark.parametrize("pinned", [False, True])
def test_spread_average_leaves_the_step_as_it_is(layout, pinned):
    assert_untouched(layout, pinned=pinned)


@pytest.fixture
def no_barrier(monkeypatch):
    """The defect that the barrier is there for."""
    monkeypatch.setattr(_moves, "stop_propagation", lambda x: x)


# What the tests above would say without the barrier.


@parametrize(THINNER)
def test_without_barrier_parameters_are_spread_as_well(layout, no_barrier):
    with pytest.raises(AssertionError, match="moved to NamedSharding"):
        assert_untouched(layout, pinned=False)


@parametrize(THINNER)
def test_without_barrier_pinned_parameters_are_gathered(layout, no_barrier):
    with pytest.raises(AssertionError, match="all-gather"):
        assert_untouched(layout, pinned=True)
    average = swa_jax.swa(sharding=layout.sharding(layout.average))
    more = compile_and_run(layout, average, pinned=True).collectives
    more -= compile_and_run(layout, pinned=True).collectives
    # Each weight, and what it became.
    assert more == {"all-gather": 2 * WEIGHTS}


def test_older_partitioner_still_compiles():
    # It has no barrier, so parameters may be spread: only the values must be right.
    if not hasattr(jax.config, "jax_use_shardy_partitioner"):
        pytest.skip("this JAX has Shardy only")
    layout = THINNER["replicated"]
    average = swa_jax.swa(sharding=layout.sharding(layout.average))
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        swa = compile_and_run(layout, average, pinned=True)
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)
    mean = swa_jax.swa_state(swa.opt_state).avg_params
    chex.assert_trees_all_equal(jax.device_get(mean), jax.device_get(swa.params))


# The identity, as other transformations see it.


def squared(x: jax.Array) -> jax.Array:
    return stop_propagation(x) ** 2


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    "x",
    [
        np.arange(3.0, dtype=np.float32),
        jnp.arange(3, dtype=jnp.bfloat16),
        np.int32(7),
        np.array([True, False]),
        np.zeros((0, 2), np.complex64),
    ],
    ids=lambda x: f"{x.dtype}{x.shape}",
)
def test_is_the_identity(x, jit):
    y = (jax.jit(stop_propagation) if jit else stop_propagation)(jnp.asarray(x))
    chex.assert_trees_all_equal(y, jnp.asarray(x), strict=True)


def test_passes_prng_keys_on():
    keys = jax.random.split(jax.random.key(0), 3)
    for transformed in (stop_propagation, jax.vmap(stop_propagation)):
        chex.assert_trees_all_equal(
            *map(jax.random.key_data, (jax.jit(transformed)(keys), keys))
        )


@pytest.mark.slow
@pytest.mark.parametrize("jit", [False, True])
def test_derivatives(jit):
    f = jax.jit(squared) if jit else squared
    x = jnp.array([1.0, -2.0, 3.0])
    chex.assert_trees_all_equal(jax.jvp(f, (x,), (x,)), (x**2, 2 * x**2))
    chex.assert_trees_all_equal(jax.grad(lambda x: f(x).sum())(x), 2 * x)
    chex.assert_trees_all_equal(jax.hessian(lambda x: f(x).sum())(x), 2 * jnp.eye(3))
    (transposed,) = jax.linear_transpose(stop_propagation, x)(x)
    chex.assert_trees_all_equal(transposed, x)
    rematerialised = jax.grad(jax.checkpoint(lambda x: f(x).sum()))(x)
    chex.assert_trees_all_equal(rematerialised, 2 * x)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_vmap(axis, jit):
    x = jnp.arange(6.0).reshape(2, 3)
    batched = jax.vmap(lambda x: squared(x) + x.sum(), in_axes=axis, out_axes=axis)
    expected = x**2 + x.sum(axis=1 - axis, keepdims=True)
    y = (jax.jit(batched) if jit else batched)(x)
    chex.assert_trees_all_equal(y, jnp.broadcast_to(expected, y.shape))


def test_in_control_flow():
    final, seen = jax.lax.scan(
        lambda c, x: (stop_propagation(c + x), c), jnp.float32(0), jnp.arange(1.0, 4.0)
    )
    assert float(final) == 6
    chex.assert_trees_all_equal(seen, jnp.array([0.0, 1.0, 3.0]))


def test_under_shard_map_and_pmap():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jnp.arange(8.0)
    mapped = jax.shard_map(squared, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    chex.assert_trees_all_equal(jax.device_get(jax.jit(mapped)(x)), np.arange(8.0) ** 2)
    chex.assert_trees_all_equal(
        jax.device_get(jax.pmap(squared)(x)), np.arange(8.0) ** 2
    )


@pytest.mark.parametrize(
    "platforms",
    [["cpu"], ["cuda"], ["tpu"], ["rocm"], ["cpu", "cuda", "tpu", "rocm"]],
    ids="-".join,
)
def test_exports_to_every_platform(platforms):
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n, 4"), jnp.float32)
    exported = jax.export.export(jax.jit(squared), platforms=platforms)(x)
    assert "sdy.propagation_barrier" in exported.mlir_module()
    if "cpu" in platforms:
        y = exported.call(jnp.full((2, 4), 3.0))
        chex.assert_trees_all_equal(y, jnp.full((2, 4), 9.0))
