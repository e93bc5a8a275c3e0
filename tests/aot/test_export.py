"""The step travels: one serialised module for every platform that JAX knows."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export

import swa_jax

PLATFORMS = ("cpu", "cuda", "tpu", "rocm")


def test_step_exports_to_every_platform():
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), swa_jax.swa(start_step=2, period=2))

    def step(params, leaves, grads):
        # Containers of an optimizer state are classes, which a file cannot hold.
        opt_state = jax.tree.unflatten(jax.tree.structure(start), leaves)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), jax.tree.leaves(opt_state)

    params = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3, jnp.bfloat16)}
    grads = jax.tree.map(jnp.ones_like, params)
    start = jax.jit(tx.init)(params)
    exported = export.export(jax.jit(step), platforms=PLATFORMS)(
        params, jax.tree.leaves(start), grads
    )
    again = export.deserialize(exported.serialize())
    assert set(again.platforms) == set(PLATFORMS)

    # On this one it also runs, and computes what the step does. Steps 2 and 4 are
    # averaged, and a compiled step rounds as the compiled one that it came from.
    here, there = (params, jax.tree.leaves(start)), (params, jax.tree.leaves(start))
    for _ in range(4):
        here, there = jax.jit(step)(*here, grads), jax.jit(again.call)(*there, grads)
    chex.assert_trees_all_equal(here, there)
    state = swa_jax.swa_state(jax.tree.unflatten(jax.tree.structure(start), there[1]))
    assert int(state.num_averaged) == 2
    assert np.isfinite(np.asarray(state.avg_params["w"])).all()
