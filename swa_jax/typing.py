"""The types that public signatures are written in.

Most are aliases, to annotate one's own code with; at run time they check nothing.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import jax
import numpy as np
from jax.sharding import Sharding

#: Any nesting of containers, with arrays as its leaves.
PyTree: TypeAlias = Any
#: A pytree that a function gives back as it was given: the caller's own type.
TreeT = TypeVar("TreeT")
_ItemT = TypeVar("_ItemT", covariant=True)
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
#: Whether a model may enter: a bool, also NumPy's or as an array of shape (), also
#: traced. ``None`` means yes.
Sample: TypeAlias = bool | np.bool_ | np.ndarray | jax.Array | None
#: How the statistics of batches are combined, see ``recompute_batch_stats``.
Mode: TypeAlias = Literal["pooled", "sample_weighted", "equal_weighted"]
#: A learning rate: a real number, also NumPy's or an array of shape (), also traced.
Rate: TypeAlias = float | np.floating | np.integer | np.ndarray | jax.Array
#: How a learning rate goes over into another.
Strategy: TypeAlias = Literal["cos", "linear"]
#: Called with the numbers of one event.
Logger: TypeAlias = Callable[[dict[str, float]], object]
#: Which average: the type of its state, or a name; ``None`` for the only one.
Which: TypeAlias = type | str | None


class Indexed(Protocol[_ItemT]):
    """As much of a sequence as is needed to take its items one at a time."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int, /) -> _ItemT:
        """The item at ``index``, which may be loaded only now."""
