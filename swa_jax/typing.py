"""The types that public signatures are written in.

Most are aliases, to annotate one's own code with; at run time they check nothing.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias, TypeVar

import jax
from jax.sharding import Sharding

#: Any nesting of containers, with arrays as its leaves.
PyTree: TypeAlias = Any
#: A pytree that a function gives back as it was given: the caller's own type.
TreeT = TypeVar("TreeT")
#: One sharding for every leaf, a (prefix) pytree of shardings, or a function from a
#: leaf's ``ShapeDtypeStruct`` to its sharding. ``None``, also as the function's result,
#: leaves a leaf where the parameter is.
Placement: TypeAlias = (
    Sharding | PyTree | Callable[[jax.ShapeDtypeStruct], Sharding | None] | None
)
#: How much of an exponential average each new model leaves: a number, or a function of
#: the models averaged so far, the newcomer included (an int32 scalar).
Decay: TypeAlias = jax.typing.ArrayLike | Callable[[jax.Array], jax.typing.ArrayLike]
#: One forward pass in training mode: (params, batch_stats, batch) -> batch_stats.
BatchStatsFn: TypeAlias = Callable[[PyTree, PyTree, PyTree], PyTree]
#: From a batch to what it counts for.
BatchWeight: TypeAlias = Callable[[PyTree], jax.typing.ArrayLike]
#: Leaves that stay as they are: one name, several, or a predicate on names.
Keep: TypeAlias = str | Iterable[str] | Callable[[str], bool] | None
#: What a model is called with: its key or index in a batch, or a function from the
#: batch to it, whose tuple is several arguments. ``None`` for the batch itself.
Inputs: TypeAlias = str | int | Callable[[PyTree], Any] | None
#: How a learning rate goes over into another.
Strategy: TypeAlias = Literal["cos", "linear"]
#: Called with the numbers of one event.
Logger: TypeAlias = Callable[[dict[str, float]], object]
#: Which average: the type of its state, or a name; ``None`` for the only one.
Which: TypeAlias = type | str | None
