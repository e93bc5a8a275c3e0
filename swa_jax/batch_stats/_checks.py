"""What a pass may be called with, and what the model may return."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from swa_jax.typing import PyTree


def check_concrete(*trees: PyTree) -> None:
    """Raises inside a trace, where the loop over batches cannot run."""
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(trees)):
        raise TypeError(
            "recompute_batch_stats received values that are being traced: it loops "
            "over batches on the host, and compiles the forward pass itself. Call it "
            "outside jax.jit, jax.pmap and the like; for pmap there is axis_name="
        )


def check_arrays(**trees: PyTree) -> None:
    """Raises for a leaf that is no array, such as a function beside the weights."""
    for argument, tree in trees.items():
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            number = isinstance(leaf, bool | int | float | complex | np.generic)
            if not number and not isinstance(leaf, jax.Array | np.ndarray):
                raise TypeError(
                    f"recompute_batch_stats: {argument}{jax.tree_util.keystr(path)} "
                    f"must be an array, got {type(leaf).__name__}; pass arrays only, "
                    "and let batch_stats_fn hold the rest (in Equinox, params, rest = "
                    "eqx.partition(model, eqx.is_array))"
                )


def mapped_devices(axis_name: str, *trees: PyTree) -> int:
    """The devices of this process along a mapped axis, from the arrays' leading one."""
    found: dict[Any, str] = {}
    for tree, name in zip(trees, ("params", "batch_stats"), strict=True):
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            lead = np.shape(leaf)[:1]
            found.setdefault(lead, f"{name}{jax.tree_util.keystr(path)}")
    devices = jax.local_device_count()
    if len(found) == 1 and () not in found and 0 < next(iter(found))[0] <= devices:
        return int(next(iter(found))[0])
    some = list(found.items())[:4]
    leads = ", ".join(f"{name} has {lead or 'none'}" for lead, name in some)
    raise ValueError(
        f"axis_name={axis_name!r} says that params and batch_stats carry pmap's "
        f"leading device axis, of at most {devices} devices, but {leads}. Fix: stack a "
        "copy for each device, as in jax.tree.map(lambda x: jnp.stack([x] * n), "
        "params), or leave axis_name out"
    )


def without_device_axis(tree: PyTree) -> PyTree:
    """What one device sees of arrays with a leading device axis: shapes and dtypes."""

    def one(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(np.shape(x)[1:], jnp.asarray(x).dtype)

    return jax.tree.map(one, tree)


def check_like(new: PyTree, batch_stats: PyTree) -> None:
    """Raises unless the model returned statistics like those it was given."""
    got, expected = (
        {
            jax.tree_util.keystr(path): (jnp.shape(leaf), jnp.result_type(leaf))
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        }
        for tree in (new, batch_stats)
    )
    for name in sorted(got.keys() ^ expected.keys()):
        raise ValueError(
            f"batch_stats_fn must return statistics with the structure of batch_stats; "
            f"leaf {name} is {'missing' if name in expected else 'not expected'}. In "
            "Flax, return updated['batch_stats'], without the model's output"
        )
    for name, (shape, dtype) in expected.items():
        if got[name] != (shape, dtype):
            raise ValueError(
                f"batch_stats_fn must return statistics like batch_stats; leaf {name} "
                f"has shape {got[name][0]} and dtype {got[name][1]}, expected {shape} "
                f"and {dtype}. If the arrays carry pmap's leading device axis, pass "
                "axis_name="
            )
