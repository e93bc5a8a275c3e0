"""Finding an average in an optimizer state, and whether it stands where it must."""

import collections
from typing import Any, TypeVar, overload

import jax
from jax.tree_util import KeyPath

from swa_jax._layouts import origin
from swa_jax._validate import shown
from swa_jax.averages.ema import EMAState, PowerEMAState
from swa_jax.averages.lawa import LAWAState
from swa_jax.averages.swa import CompensatedSWAState, SWAState
from swa_jax.averages.swag import SWAGState
from swa_jax.typing import PyTree, Which

#: Types of the states that are averages.
_AVERAGES = (SWAState, EMAState, PowerEMAState, LAWAState, SWAGState)
_StateT = TypeVar("_StateT")
#: States of optax.chain and named_chain: one a link, in order.
_CHAINS = (tuple, collections.OrderedDict)
#: States of wrappers that turn the updates of the optimizer inside into others.
_REWRITERS = {"LookaheadState", "MechanicState", "ScheduleFreeState"}
#: Those of wrappers that do to updates what the transformation inside does.
_TRANSPARENT = {
    "InjectHyperparamsState",
    "InjectStatefulHyperparamsState",
    "MaskedState",
}


def swa_state(opt_state: PyTree) -> SWAState:
    """Finds the one ``SWAState`` in an optimizer state, however deeply nested.

    Args:
      opt_state: any pytree around it: the state of ``optax.chain``, ``named_chain``,
        ``MultiSteps``, ``masked``, ``partition``, ``apply_if_finite`` or
        ``inject_hyperparams``, a Flax ``TrainState``, an ``nnx.Optimizer``.

    Returns:
      The state, its counters as arrays.

    Raises:
      ValueError: there is none, or more than one; it has lost its structure, as in a
        checkpoint that was restored without one; or ``swa()`` was not last: another
        state follows it in the tuple of an ``optax.chain``, or it stands inside a
        wrapper such as ``schedule_free``, so that it has not seen the updates as they
        were applied.

    Example:
      See ``swa``.
    """
    return average_state(opt_state, SWAState)


@overload
def average_state(opt_state: PyTree, which: type[_StateT]) -> _StateT: ...


@overload
def average_state(opt_state: PyTree, which: str | None = None) -> Any: ...


def average_state(opt_state: PyTree, which: Which = None) -> Any:
    """Finds one average in an optimizer state, however deeply nested.

    Args:
      opt_state: any pytree around it, see ``swa_state``.
      which: the type of its state, such as ``swa_jax.EMAState``, or the name of its
        link in ``optax.named_chain`` (or of its group in ``optax.partition``). Where
        there is only one average, ``None`` will do.

    Returns:
      The state, its counters as arrays.

    Raises:
      ValueError: there is none, or more than one, each of which the message gives with
        type and path; for the rest see ``swa_state``.
      TypeError: ``which`` is neither a type of state nor a name.

    Example:
      >>> import jax.numpy as jnp, optax, swa_jax
      >>> tx = optax.named_chain(("sgd", optax.sgd(0.1)), ("slow", swa_jax.ema(0.999)),
      ...                        ("fast", swa_jax.ema(0.9)), ("mean", swa_jax.swa()))
      >>> opt_state = tx.init(jnp.zeros(2))
      >>> print(type(swa_jax.average_state(opt_state, "fast")).__name__)
      EMAState
      >>> print(type(swa_jax.average_state(opt_state, swa_jax.SWAState)).__name__)
      SWAState
    """
    state = located(opt_state, which)
    # Flax's nnx wraps every array of an optimizer state in a Variable.
    num_updates, num_averaged = jax.tree.leaves((state.num_updates, state.num_averaged))
    if isinstance(state, CompensatedSWAState):
        return state._replace(
            average=state.average._replace(
                num_updates=num_updates, num_averaged=num_averaged
            )
        )
    return state._replace(num_updates=num_updates, num_averaged=num_averaged)


def located(opt_state: PyTree, which: Which = None) -> Any:
    """The same, as it lies in ``opt_state``: that very object."""
    wanted = (CompensatedSWAState,) if which is CompensatedSWAState else _AVERAGES
    everything = _all_in(opt_state, wanted)
    found = [pair for pair in everything if _is_meant(which, *pair)]
    if not found:
        raise ValueError(_none_found(opt_state, which, everything))
    for _, state in found:
        _check_last(opt_state, state)
    if len(found) > 1:
        raise ValueError(_several_found(which, found))
    return found[0][1]


def holds_average(tree: PyTree) -> bool:
    """Whether there is any average in ``tree``."""
    return any(map(is_average, jax.tree.leaves(tree, is_leaf=is_average)))


def is_average(x: Any) -> bool:
    """Whether ``x`` is the state of an average."""
    return isinstance(x, _AVERAGES)


def _all_in(tree: PyTree, types: tuple[type, ...]) -> list[tuple[KeyPath, Any]]:
    is_one = lambda x: isinstance(x, types)  # noqa: E731
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_one)
    return [(path, node) for path, node in flat if is_one(node)]


def _is_meant(which: Which, path: KeyPath, state: Any) -> bool:
    if which is None:
        return True
    if isinstance(which, str):
        return which in [getattr(k, "key", getattr(k, "name", None)) for k in path]
    if which not in (*_AVERAGES, CompensatedSWAState):
        names = ", ".join(f"swa_jax.{kind.__name__}" for kind in _AVERAGES)
        raise TypeError(
            f"which must be the type of an average's state ({names}), or its name in "
            f"optax.named_chain, got {shown(which)}"
        )
    return type(state) is which


def _check_last(node: PyTree, state: Any, path: KeyPath = ()) -> None:
    """Raises if what ``state`` lies in changes the updates behind it."""
    if node is state:
        return
    if type(node).__name__ in _REWRITERS:
        raise ValueError(
            f"{_name(path)} is a {type(node).__name__}: this wrapper turns the updates "
            "that swa() inside it has seen into others, so that the average is not of "
            "the weights that were trained. Fix: put swa() behind the wrapper, as in "
            "optax.chain(wrapper(optimizer), swa_jax.swa(...))"
        )
    flat, _ = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda x: x is not node
    )
    children = [((*path, *key), child) for key, child in flat]
    at = next(i for i, (_, child) in enumerate(children) if _holds(child, state))
    key, child = children[at]
    if type(node) in _CHAINS:
        # Behind an average of some leaves, another mask is the way to freeze the rest.
        hidden = type(child).__name__ == "MaskedState"
        for later, link in children[at + 1 :]:
            apart = hidden and type(link).__name__ == "MaskedState"
            if not apart and not _only_averages(link):
                raise ValueError(_not_last(_name(key), _name(later), link))
    _check_last(child, state, key)


def _holds(tree: PyTree, state: Any) -> bool:
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: x is state)
    return any(leaf is state for leaf in leaves)


def _not_last(part: str, later: str, link: Any) -> str:
    return (
        f"{later} (a {type(link).__name__}) follows {part}, which holds the state of "
        "swa(): a later link of optax.chain changes the updates that swa() has seen, "
        "and the average is not of the weights that were trained. Fix: put swa() last "
        "(only another average may follow: no other state tells whether its link "
        "changes updates, not even that of optax.identity). If the tuple is your own, "
        f"as of several optimizers, pass {part}"
    )


def _only_averages(node: Any) -> bool:
    """Whether a link is nothing but averages, which leave the updates alone."""
    if type(node).__name__ in _TRANSPARENT:
        return _only_averages(node.inner_state)
    if type(node) in _CHAINS:
        links = list(node.values()) if isinstance(node, dict) else node
        return bool(links) and all(map(_only_averages, links))
    return is_average(node) or isinstance(node, CompensatedSWAState)


def _several_found(which: Which, found: list[tuple[KeyPath, Any]]) -> str:
    kind = f"{which.__name__}s" if isinstance(which, type) else "averages"
    listed = _listed(found[:3])
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return (
        f"opt_state holds {len(found)} {kind}, where one was expected: {listed}{more}; "
        "name the one that you mean, as in average_state(opt_state, which=...) by its "
        "type or its name in optax.named_chain, or pass the part of opt_state with it"
    )


def _listed(found: list[tuple[KeyPath, Any]]) -> str:
    return ", ".join(
        f"{type(state).__name__} at {_name(path)}" for path, state in found
    )


def _none_found(
    opt_state: PyTree, which: Which, others: list[tuple[KeyPath, Any]]
) -> str:
    """Says what was passed instead, and how to go on."""
    kind = type(opt_state).__name__
    name = "average"
    if which is not None:
        name = which.__name__ if isinstance(which, type) else f"average named {which!r}"
    if others:
        return f"opt_state (a {kind}) holds no {name}, only {_listed(others)}"
    lost = _lost_structure(opt_state)
    if lost is None:
        return (
            f"opt_state (a {kind}) holds no {name}; chain swa_jax.swa(...), or another "
            "average, into the optimizer, as in optax.chain(optax.sgd(0.1), "
            "swa_jax.swa(...)), and pass the whole optimizer state"
        )
    return (
        f"opt_state (a {kind}) has the fields of an average at {_name(lost)}, but not "
        f"its type: it has lost its structure{origin(opt_state, lost)}. Fix: restore "
        "the checkpoint into the structure of tx.init(params), as "
        "flax.serialization.from_bytes(target, data) or Orbax's restore(path, target) "
        "does; with Flax's nnx pass the nnx.Optimizer itself, or its opt_state, and "
        "not nnx.state of it"
    )


def _lost_structure(tree: PyTree) -> KeyPath | None:
    """Where the fields of an average lie in some other container."""
    names: dict[KeyPath, set[Any]] = {}
    for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]:
        for end, key in enumerate(path):
            name = getattr(key, "key", getattr(key, "name", None))
            names.setdefault(path[:end], set()).add(name)
    fields = {"num_updates", "num_averaged"}  # avg_params may be empty
    return next((path for path, there in names.items() if fields <= there), None)


def _name(path: KeyPath) -> str:
    return f"opt_state{jax.tree_util.keystr(path)}"
