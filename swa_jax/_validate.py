"""What callers give: counts, rates, dtypes, and weights that fit an average."""

import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from swa_jax._placement._kinds import is_traced
from swa_jax.typing import PyTree

#: The largest count: counters of updates are int32, as optax's are.
MAX_COUNT = int(np.iinfo(np.int32).max)


def shown(value: Any) -> str:
    """``value`` for a message, in a line: of arrays the shape, not the numbers."""
    kind = type(value).__name__
    if getattr(value, "shape", ()):
        return f"an array of shape {value.shape}"
    if any(getattr(leaf, "shape", ()) for leaf in jax.tree.leaves(value)):
        return f"a {kind} of arrays"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}... (a {kind})"


def known(value: Any) -> Any:
    """A value as the host has it, where it is a JAX array: an explicit transfer."""
    return jax.device_get(value) if isinstance(value, jax.Array) else value


def check_count(
    name: str,
    value: Any,
    *,
    at_least: int = 1,
    hint: str = "",
    traced: bool = False,
    boolean: bool = False,
) -> Any:
    """Returns ``value`` as an integer that counts something, or raises.

    Args:
      name: the argument to name in the message.
      value: what was given for it.
      at_least: the smallest that is allowed.
      hint: what it counts, and how to make it an integer.
      traced: whether an integer inside a trace, of which nothing is known, will do.
      boolean: whether ``True`` is 1, as for PyTorch.
    """
    hint = hint and f"; {hint}"
    if is_traced(value) and traced and jnp.issubdtype(value.dtype, jnp.integer):
        return value.astype(jnp.int32)
    try:
        if is_traced(value) or (isinstance(value, bool) and not boolean):
            raise TypeError
        count = operator.index(known(value))
    except TypeError:
        outside = "" if traced else " known outside jit"
        raise TypeError(
            f"{name} must be an integer{outside}, got {shown(value)} of type "
            f"{type(value).__name__}{hint}"
        ) from None
    if not at_least <= count <= MAX_COUNT:
        bound = f"least {at_least}" if count < at_least else f"most {MAX_COUNT} (int32)"
        raise ValueError(f"{name} must be at {bound}, got {count}{hint}")
    return count


def check_number(
    name: str,
    value: Any,
    low: float,
    high: float,
    *,
    open_below: bool = False,
    closed: bool = False,
    hint: str = "",
    traced: bool = False,
) -> Any:
    """Returns ``value`` as a float in a range, or raises.

    Args:
      name: the argument to name in the message.
      value: what was given for it.
      low: the lower end, part of the range unless ``open_below``.
      high: the upper end, part of the range if ``closed``.
      open_below: see ``low``.
      closed: see ``high``.
      hint: what to do instead.
      traced: whether a number inside a trace, of which nothing is known, will do.
    """
    if is_traced(value) and traced and _is_real(value):
        return value
    if is_traced(value) or not _is_real(value):
        inside = " known outside jit" if is_traced(value) and _is_real(value) else ""
        raise TypeError(
            f"{name} must be a number{inside}, got {shown(value)} of type "
            f"{type(value).__name__}{hint and f'; {hint}'}"
        )
    number = float(known(value))
    above = number > low if open_below else number >= low
    if not (above and (number <= high if closed else number < high)):
        interval = f"{'(' if open_below else '['}{low:g}, {high:g}{')]'[closed]}"
        raise ValueError(
            f"{name} must be in {interval}, got {number!r}{hint and f'; {hint}'}"
        )
    return number


def check_rate(name: str, rate: Any, or_else: str = "") -> None:
    """Raises unless ``rate`` is a learning rate, as far as its value is known.

    Args:
      name: the argument to name in the message.
      rate: what was given for it.
      or_else: what else it could have been, as in ``" or None"``.
    """
    if not _is_real(rate):
        schedule = "give a schedule's value at this step; " if callable(rate) else ""
        raise TypeError(
            f"{name} must be a learning rate{or_else}, got {shown(rate)}; it is one "
            f"number, {schedule}for a rate for each group of parameters there is "
            "optax.partition"
        )
    if is_traced(rate):
        return
    number = float(known(rate))
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(
            f"{name} must be finite and not negative, got {shown(rate)}; it is the "
            f"learning rate as the optimizer gets it{or_else and ','}{or_else}"
        )


def _is_real(value: Any) -> bool:
    """Whether ``value`` is one real number, traced or not."""
    if isinstance(value, bool | str) or np.ndim(value):
        return False
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        return hasattr(value, "__float__")
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer))


def check_floating(name: str, dtype: Any) -> np.dtype:
    """Returns ``dtype`` as a NumPy dtype, or raises unless it is a floating one."""
    try:
        checked = jnp.dtype(dtype)
    except TypeError:
        checked = None
    if checked is None or not jnp.issubdtype(checked, jnp.floating):
        raise TypeError(
            f"{name} must be a floating dtype such as jnp.float32, got {dtype!r}"
        )
    return checked


def check_accumulator_dtype(dtype: Any) -> np.dtype | None:
    """Returns ``dtype`` as a NumPy dtype, or raises; ``None`` passes."""
    if dtype is None:
        return None
    checked = check_floating("accumulator_dtype", dtype)
    if jax.dtypes.canonicalize_dtype(checked) != checked:
        raise ValueError(
            f"accumulator_dtype={checked.name} needs JAX's 64-bit types, which are "
            "off: call jax.config.update('jax_enable_x64', True) at start-up, or use "
            "float32"
        )
    return checked


def check_sample(sample: Any, *, caller: str) -> Any:
    """Returns ``sample`` as a bool array, or raises; ``None`` passes."""
    if sample is None:
        return None
    if not isinstance(sample, bool | np.bool_ | np.ndarray | jax.Array):
        found = f"a {type(sample).__name__}"
    elif (dtype := getattr(sample, "dtype", np.dtype(bool))) != np.bool_:
        found = f"an array of {dtype}"
    elif np.shape(sample) != ():
        raise ValueError(
            f"{caller}: sample must be a scalar, got shape {np.shape(sample)}; it "
            "decides on the whole model. Fix: under jax.vmap, pass one bool a member"
        )
    else:  # one type for all, so that none compiles anew
        return sample if isinstance(sample, jax.Array) else jax.device_put(sample)
    raise TypeError(
        f"{caller}: sample must be a bool, or a bool scalar as an array, got {found}. "
        "Fix: compare, as in sample=(step % period == 0)"
    )


def leaf_dtype(leaf: Any) -> Any:
    """The dtype that ``leaf`` has, or gets, as a JAX array."""
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return leaf.dtype
    if hasattr(leaf, "__jax_array__"):
        return jnp.asarray(leaf).dtype
    # Without making the array, which would move it to a device.
    dtype = np.asarray(leaf).dtype
    kinds = (jnp.number, jnp.bool_, jax.dtypes.float0)
    if not any(jnp.issubdtype(dtype, kind) for kind in kinds):
        raise TypeError(f"no array has the dtype {dtype}")
    return jax.dtypes.canonicalize_dtype(dtype)


def leaf_dtypes(params: PyTree, *, caller: str, name: str = "params") -> list[Any]:
    """``leaf_dtype`` of all leaves.

    Raises:
      TypeError: a leaf is no array and makes none: the error names it.
    """

    def of(path: Any, leaf: Any) -> Any:
        try:
            return leaf_dtype(leaf)
        except (TypeError, ValueError):
            raise TypeError(
                f"{caller}: {name}{jax.tree_util.keystr(path)} is a "
                f"{type(leaf).__name__}, where an array was expected. Fix: pass the "
                "arrays only, as equinox.filter(model, equinox.is_inexact_array) "
                "gives them, or hide other leaves with optax.masked"
            ) from None

    return [of(path, leaf) for path, leaf in _flatten_with_path(params)]


def is_weight(x: Any) -> bool:
    """Whether ``x`` is an array of floats, which no average passes by in silence."""
    kinds = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct
    if isinstance(x, type) or not (isinstance(x, kinds) or hasattr(x, "__jax_array__")):
        return False
    try:
        return is_averaged(leaf_dtype(x))
    except (TypeError, ValueError):
        return False  # of strings, say


def is_averaged(dtype: Any) -> bool:
    """Whether leaves of ``dtype`` are averaged; others carry their latest value."""
    return jnp.issubdtype(dtype, jnp.inexact)


def mean_dtype(dtype: Any, accumulator_dtype: Any) -> Any:
    """The dtype in which a leaf of ``dtype`` is averaged."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jnp.promote_types(dtype, accumulator_dtype or dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        narrow = jnp.finfo(dtype).bits < 32
        return accumulator_dtype or (jnp.dtype(jnp.float32) if narrow else dtype)
    return dtype


def check_params(
    params: PyTree,
    avg_params: PyTree,
    *,
    caller: str,
    averaged_as: Callable[[Any], Any] | None = None,
    name: str = "params",
    other: str = "the state's average",
    fix: str = "pass the parameters that the state was created from, or create a new "
    "state from these",
) -> None:
    """Raises unless ``params`` fits the mean.

    Args:
      params: the weights that are to enter the mean.
      avg_params: the mean.
      caller: the public function to name in the message.
      averaged_as: the mean's dtype for a leaf's dtype, where it is known. Without it
        a floating leaf may enter a mean of any floating dtype, since the state does
        not tell which accumulator was asked for.
      name: what to call ``params`` in the message.
      other: what to call ``avg_params``.
      fix: the way out.

    Raises:
      TypeError: a leaf is no array.
      ValueError: the structure, a shape or a dtype differs.
    """
    structures: list[Any] = [jax.tree.structure(t) for t in (params, avg_params)]
    if structures[0] != structures[1]:
        got, expected = (
            {jax.tree_util.keystr(path) for path, _ in _flatten_with_path(tree)}
            for tree in (params, avg_params)
        )
        differ = (
            f"only in {name}: {_some(got - expected)}; only in {other}: "
            f"{_some(expected - got)}"
            if got != expected
            else f"got the containers {structures[0]}, {other} has {structures[1]}"
        )
        raise ValueError(
            f"{caller}: {name} must have the structure of {other}; {differ}. Fix: {fix}"
        )
    triples = zip(
        _flatten_with_path(params),
        leaf_dtypes(params, caller=caller, name=name),
        jax.tree.leaves(avg_params),
        strict=True,
    )
    for (path, leaf), dtype, mean in triples:
        where = f"{name}{jax.tree_util.keystr(path)}"
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                f"{caller}: {where} is a ShapeDtypeStruct, which has no values to "
                "average. Fix: pass arrays, or trace the call with jax.eval_shape"
            )
        if np.shape(leaf) != np.shape(mean):
            raise ValueError(
                f"{caller}: {where} has shape {np.shape(leaf)}, {other} "
                f"has {np.shape(mean)}; both must be the same. Fix: {fix}"
            )
        if averaged_as is None:
            fits = _kind(dtype) == _kind(mean.dtype)
            rule = "a floating leaf needs a floating average, others their own dtype"
        else:
            fits = averaged_as(dtype) == mean.dtype
            rule = f"a {dtype} leaf is averaged in {averaged_as(dtype)}"
        if not fits:
            raise ValueError(
                f"{caller}: {where} has dtype {dtype}, but {other} has "
                f"{mean.dtype}; {rule}. Fix: {fix}"
            )


def _kind(dtype: Any) -> Any:
    """What dtypes must have in common for one to enter a mean kept in the other."""
    for kind in (jnp.floating, jnp.complexfloating):
        if jnp.issubdtype(dtype, kind):
            return kind
    return dtype


def _flatten_with_path(tree: PyTree) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3]) or "nothing"
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
