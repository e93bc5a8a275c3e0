"""Keeping XLA from spreading one array's sharding to the arrays it came from.

Under Auto mesh axes XLA infers shardings along the flow of data, in both directions. So
an average that is spread over the devices would spread the parameters that enter it as
well, and every step would gather them again. XLA's partitioner, Shardy, can stop this:
``sdy.propagation_barrier``. JAX has no function for it, so this module makes it a
primitive. It is the one place that depends on how JAX lowers to MLIR.
"""

import functools
from typing import Any

import jax

_NO_DIRECTION = 0  # the value NONE of Shardy's enumeration PropagationDirection


def stop_propagation(x: jax.Array) -> jax.Array:
    """The identity; a sharding given to its result has no influence on ``x``.

    Nothing is moved or computed. Differentiable, and works under ``jax.vmap``. With the
    older partitioner (``jax_use_shardy_partitioner`` off), which has no barrier, it
    does nothing.
    """
    return _barrier().bind(x)


@functools.cache
def _barrier() -> Any:
    # Made on first use: jax.extend takes longer to import than all of this library.
    from jax.extend.core import Primitive
    from jax.interpreters import ad, batching, mlir

    barrier = Primitive("stop_sharding_propagation")
    barrier.def_impl(lambda x: x)
    barrier.def_abstract_eval(lambda aval: aval)
    batching.primitive_batchers[barrier] = lambda args, axes: (
        barrier.bind(*args),
        axes[0],
    )
    ad.deflinear2(barrier, lambda cotangent, _: [cotangent])
    mlir.register_lowering(barrier, _lower)
    return barrier


def _lower(context: Any, x: Any) -> list[Any]:
    del context
    if not getattr(jax.config, "jax_use_shardy_partitioner", True):
        return [x]
    from jax.extend.mlir import ir
    from jax.extend.mlir.dialects import sdy

    direction = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), _NO_DIRECTION)
    return [sdy.propagation_barrier(x, direction)]
