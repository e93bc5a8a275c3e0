"""What the leaves of ``batch_stats`` are called, and what that says about them."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
from jax.tree_util import GetAttrKey, KeyPath

from swa_jax.typing import Keep

#: The mean that belongs to a variance, by their own names.
PAIRS = {
    "var": "mean",
    "running_var": "running_mean",
    "moving_variance": "moving_mean",
    "var_ema": "mean_ema",
}


class Name(NamedTuple):
    """What a leaf is called.

    Attributes:
      path: as messages show it, ``batch_stats['BatchNorm_0']['mean']``.
      parts: its keys as strings, ``("BatchNorm_0", "mean")``.
    """

    path: str
    parts: tuple[str, ...]

    @classmethod
    def of(cls, path: KeyPath) -> "Name":
        """The name of the leaf at ``path``."""
        keys = path
        # Flax's nnx puts the name of a Variable's field after the variable's own.
        if len(keys) > 1 and keys[-1] == GetAttrKey("value"):
            keys = keys[:-1]
        parts = tuple(
            str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))))
            for k in keys
        )
        return cls(f"batch_stats{jax.tree_util.keystr(path)}", parts)

    @property
    def short(self) -> str:
        """As callers may write it in ``keep=``: ``BatchNorm_0/mean``."""
        return "/".join(self.parts)

    def is_called(self, wanted: str) -> bool:
        """Whether ``wanted`` is this leaf's path, or whole consecutive parts of it."""
        if wanted in (self.path, self.path.removeprefix("batch_stats")):
            return True
        return f"/{wanted.strip('/')}/" in f"/{self.short}/"


def kept_leaves(keep: Keep, names: list[Name]) -> set[int]:
    """The numbers of the leaves that the caller wants to stay as they are.

    Raises:
      TypeError: ``keep`` is neither names nor a predicate.
      ValueError: a name that no leaf has.
    """
    if keep is None:
        return set()
    if callable(keep):
        return {i for i, name in enumerate(names) if keep(name.short)}
    wanted = [keep] if isinstance(keep, str) else list(keep)
    found: set[int] = set()
    for each in wanted:
        if not isinstance(each, str):
            raise TypeError(
                "keep must be the name of a leaf, several names, or a function from a "
                f"name to bool, got {type(each).__name__}; names are written "
                f"{some(names)}"
            )
        fits = {i for i, name in enumerate(names) if name.is_called(each)}
        if not fits:
            raise ValueError(
                f"keep={each!r} names no leaf of batch_stats; it has {some(names)}"
            )
        found |= fits
    return found


class Partners(NamedTuple):
    """Which leaves belong together, by their numbers.

    Attributes:
      mean_of: for a variance, its mean.
      single: leaves that may be variances, as far as their names tell, but whose mean
        is not there.
    """

    mean_of: dict[int, int]
    single: set[int]


def find_partners(
    names: list[Name], shapes: list[tuple[int, ...]], pairs: Mapping[str, str] | None
) -> Partners:
    """Pairs variances with means by their own names, under one parent.

    Args:
      names: of the leaves.
      shapes: of the leaves; only leaves of one shape belong together.
      pairs: own or whole names of more variances, each with such a name of its mean.

    Raises:
      TypeError: ``pairs`` is not a mapping from names to names.
    """
    if pairs is not None and not (
        isinstance(pairs, Mapping)
        and all(isinstance(x, str) for pair in pairs.items() for x in pair)
    ):
        raise TypeError(
            "pairs must be a dict from the name of a variance to the name of its mean, "
            f'as in {{"sigma2": "mu"}}, got {type(pairs).__name__}'
        )
    known = {**PAIRS, **(pairs or {})}
    means = set(known.values())
    at = {name.parts: i for i, name in enumerate(names)}
    whole = {name.short: i for i, name in enumerate(names)}
    partners = Partners({}, set())
    for i, name in enumerate(names):
        own = name.parts[-1] if name.parts else ""
        mean = at.get((*name.parts[:-1], known[own])) if own in known else None
        mean = whole.get(known.get(name.short, ""), mean)
        if mean is not None and mean != i and shapes[mean] == shapes[i]:
            partners.mean_of[i] = mean
        elif own not in means or own in known:
            partners.single.add(i)
    partners.single.difference_update(partners.mean_of.values())
    return partners


def some(names: Iterable[Name]) -> str:
    """A few names, for a message."""
    shown = [name.short or "one leaf without a name" for name in names]
    more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
    return ", ".join(map(repr, shown[:4])) + more
