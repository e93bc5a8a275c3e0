"""Keeping XLA from spreading one array's sharding to the arrays it came from.

Under Auto mesh axes XLA infers shardings along the flow of data, in both directions. So
an average that is spread over the devices would spread the parameters that enter it as
well, and every step would gather them again. XLA's partitioner, Shardy, can stop this:
``sdy.propagation_barrier``. JAX has no function for it, so this module makes it a
primitive. It is the one place that depends on how JAX lowers to MLIR.
"""

from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy

_NO_DIRECTION = 0  # the value NONE of Shardy's enumeration PropagationDirection


def stop_propagation(x: jax.Array) -> jax.Array:
    """The identity; a sharding given to its result has no influence on ``x``.

    Nothing is moved or computed. Differentiable, and works under ``jax.vmap``. With the
    older partitioner (``jax_use_shardy_partitioner`` off), which has no barrier, it
    does nothing.
    """
    return _barrier.bind(x)


def _lower(context: Any, x: Any) -> list[Any]:
    del context
    if not getattr(jax.config, "jax_use_shardy_partitioner", True):
        return [x]
    direction = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), _NO_DIRECTION)
    return [sdy.propagation_barrier(x, direction)]


def _batch(args: Any, axes: Any) -> tuple[jax.Array, Any]:
    return stop_propagation(*args), axes[0]


_barrier = Primitive("stop_sharding_propagation")
_barrier.def_impl(lambda x: x)
_barrier.def_abstract_eval(lambda aval: aval)
mlir.register_lowering(_barrier, _lower)
batching.primitive_batchers[_barrier] = _batch
ad.deflinear2(_barrier, lambda cotangent, _: [cotangent])
