"""Which version writes which state, told by the names of its fields.

States are NamedTuples of arrays, and a checkpoint keeps the names of their fields but
not their type, and no version: both are read off the names. A change of a state's
fields adds a line here, and leaves the old one; ``tests/golden/checkpoints`` keeps
states as each version wrote them.
"""

from collections.abc import Mapping
from typing import Any

from jax.tree_util import KeyPath

#: By the names of the fields: which states they are, and the version that began it.
_LAYOUTS: dict[frozenset[str], tuple[str, str]] = {
    frozenset(names.split()): (states, version)
    for names, states, version in (
        ("average compensation", "a CompensatedSWAState", "0.1.0"),
        (
            "num_updates num_averaged avg_params",
            "an SWAState, an EMAState or a PowerEMAState",
            "0.1.0",
        ),
        ("num_updates num_averaged window", "a LAWAState", "0.1.0"),
        (
            "num_updates num_averaged avg_params sq_deviations deviations",
            "a SWAGState",
            "0.1.0",
        ),
    )
}


def origin(tree: Any, path: KeyPath) -> str:
    """In words, what the container at ``path``, with an average's counters, was."""
    around, fields = _fields(tree, path[:-1]), _fields(tree, path)
    if fields is None:  # a container of no kind that is known
        return ""
    if around in _LAYOUTS:  # an average inside another state of ours
        fields = around
    if fields in _LAYOUTS:
        states, version = _LAYOUTS[fields]
        return (
            f". These are the fields of {states}, as swa_jax {version} and later write"
        )
    from swa_jax import __version__  # which is set after this module is imported

    return (
        f". Fields named {', '.join(sorted(fields))} together are of no state up to "
        f"swa_jax {__version__}, which this is: a later version wrote them; install it"
    )


def _fields(tree: Any, path: KeyPath) -> frozenset[str] | None:
    """The names in a container, also of fields without arrays."""
    for key in path:
        try:
            step = getattr(key, "key", getattr(key, "idx", None))
            tree = getattr(tree, key.name) if step is None else tree[step]
        except (AttributeError, KeyError, IndexError, TypeError):
            return None
    if isinstance(tree, Mapping) and all(isinstance(name, str) for name in tree):
        return frozenset(tree)
    return None
