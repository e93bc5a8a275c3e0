"""Finding the average in an optimizer state, and whether it stands where it must."""

import collections
from collections.abc import Iterator
from typing import Any

import jax

from swa_jax.averages.swa import CompensatedSWAState, SWAState
from swa_jax.typing import PyTree

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
    found = list(_search(opt_state, ()))
    if not found:
        raise ValueError(_none_found(opt_state))
    if len(found) > 1:
        paths = ", ".join(_name(path) for path, _ in found[:3])
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(
            f"opt_state holds {len(found)} SWAStates, where one was expected: "
            f"{paths}{more}; pass the part of opt_state with the one that you mean"
        )
    state = found[0][1]
    # Flax's nnx wraps every array of an optimizer state in a Variable.
    num_updates, num_averaged = jax.tree.leaves(state[:2])
    return state._replace(num_updates=num_updates, num_averaged=num_averaged)


def holds_average(tree: PyTree) -> bool:
    """Whether there is any ``SWAState`` in ``tree``."""
    return any(map(is_swa_state, jax.tree.leaves(tree, is_leaf=is_swa_state)))


def is_swa_state(x: Any) -> bool:
    return isinstance(x, SWAState)


def _search(node: PyTree, path: tuple[Any, ...]) -> Iterator[tuple[Any, SWAState]]:
    """All averages with their paths, after a look at what stands behind them."""
    if is_swa_state(node):
        yield path, node
    elif holds_average(node):
        children, _ = jax.tree_util.tree_flatten_with_path(
            node, is_leaf=lambda x: x is not node
        )
        children = [((*path, *key), child) for key, child in children]
        _check_last(node, path, children)
        for key, child in children:
            yield from _search(child, key)


def _check_last(node: Any, path: Any, children: list[tuple[Any, Any]]) -> None:
    """Raises if what ``node`` belongs to changes the updates behind ``swa()``."""
    if type(node).__name__ in _REWRITERS:
        raise ValueError(
            f"{_name(path)} is a {type(node).__name__}: this wrapper turns the updates "
            "that swa() inside it has seen into others, so that the average is not of "
            "the weights that were trained. Fix: put swa() behind the wrapper, as in "
            "optax.chain(wrapper(optimizer), swa_jax.swa(...))"
        )
    if type(node) not in _CHAINS:
        return
    part, hidden = "", False
    for key, child in children:
        # Behind an average of some leaves, another mask is the way to freeze the rest.
        apart = hidden and type(child).__name__ == "MaskedState"
        if part and not apart and not _only_averages(child):
            raise ValueError(
                f"{_name(key)} (a {type(child).__name__}) follows {part}, which holds "
                "the state of swa(): a later link of optax.chain changes the updates "
                "that swa() has seen, and the average is not of the weights that were "
                "trained. Fix: put swa() last (only another swa() may follow: no other "
                "state tells whether its link changes updates, not even that of "
                "optax.identity). If the tuple is your own, as of several optimizers, "
                f"pass {part}"
            )
        if holds_average(child):
            part = part or _name(key)
            hidden = hidden or type(child).__name__ == "MaskedState"


def _only_averages(node: Any) -> bool:
    """Whether a link is nothing but averages, which leave the updates alone."""
    if type(node).__name__ in _TRANSPARENT:
        return _only_averages(node.inner_state)
    if type(node) in _CHAINS:
        links = list(node.values()) if isinstance(node, dict) else node
        return bool(links) and all(map(_only_averages, links))
    return is_swa_state(node) or isinstance(node, CompensatedSWAState)


def _none_found(opt_state: PyTree) -> str:
    """Says what was passed instead, and how to go on."""
    kind = type(opt_state).__name__
    lost = _lost_structure(opt_state)
    if lost is None:
        return (
            f"opt_state (a {kind}) holds no SWAState; chain swa_jax.swa(...) into the "
            "optimizer, as in optax.chain(optax.sgd(0.1), swa_jax.swa(...)), and pass "
            "the whole optimizer state"
        )
    return (
        f"opt_state (a {kind}) has the fields of an SWAState at {_name(lost)}, but not "
        "its type: it has lost its structure. Fix: restore the checkpoint into the "
        "structure of tx.init(params), as flax.serialization.from_bytes(target, data) "
        "or Orbax's restore(path, target) does; with Flax's nnx pass the nnx.Optimizer "
        "itself, or its opt_state, and not nnx.state of it"
    )


def _lost_structure(tree: PyTree) -> tuple[Any, ...] | None:
    """Where the fields of an ``SWAState`` lie in some other container."""
    names: dict[tuple[Any, ...], set[Any]] = {}
    for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]:
        for end, key in enumerate(path):
            name = getattr(key, "key", getattr(key, "name", None))
            names.setdefault(path[:end], set()).add(name)
    fields = {"num_updates", "num_averaged"}  # avg_params may be empty
    return next((path for path, there in names.items() if fields <= there), None)


def _name(path: tuple[Any, ...]) -> str:
    return f"opt_state{jax.tree_util.keystr(path)}"
