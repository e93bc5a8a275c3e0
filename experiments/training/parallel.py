"""Data parallelism: one training step, run by three interchangeable strategies.

Every strategy keeps the whole state, the average included, on each device, gives each
device an equal part of the batch, and takes the mean of the gradients:

- `pmap`: `jax.pmap`. Arrays carry a leading device axis; each process holds the part
  of it that its own devices have.
- `shard_map`: `jax.shard_map` inside `jax.jit`. The step is the same per-device
  program, but arrays are global ones, placed on a mesh.
- `jit`: `jax.jit` over the same global arrays. The step is the single-device one, and
  the compiler puts the communication in.

What BatchNorm sees in training: under `jit` the global batch, with nothing to set up,
as on one device. Under `pmap` and `shard_map` each device's part of it, unless the
layer is given `axis_name`, which averages the moments over the devices; experiments
always give it. The three then train the same network, up to the rounding of float32 and
with the exception of dropout: under `pmap` and `shard_map` each device draws a mask of
its own for its rows, under `jit`, as on one device, one mask is drawn for all rows.
Without it every device would normalise by its own few rows and end up with running
statistics of its own; `shard_map` refuses that while tracing, `pmap` does not notice.

Evaluation, and the BatchNorm pass over averaged weights, run on all devices of the job
by plain `jax.jit` over global arrays, whichever of the three trains.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments.runtime.errors import DevicesError

PyTree = Any
Name = Literal["none", "pmap", "shard_map", "jit"]
StepFn = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]  # to state and metrics

AXIS_NAME = "data"


class Strategy(NamedTuple):
    """How a training step, and evaluation, run on all devices of all processes."""

    # That the step averages over; None: it sees all devices' rows.
    axis_name: str | None
    place_state: Callable[[PyTree], PyTree]  # from one device to all of them
    place_batch: Callable[[PyTree], PyTree]  # from this process's rows to its devices
    compile: Callable[[StepFn], StepFn]  # the compiled step donates the state
    fetch: Callable[[PyTree], PyTree]  # state on all devices -> on this process's first
    # For evaluation: a tree of one device to all, and rows shared among them.
    replicate: Callable[[PyTree], PyTree]
    share: Callable[[PyTree], PyTree]
    devices: int  # that divide a batch of evaluation


def make_strategy(name: Name, batch_size: int) -> Strategy:
    """Build the strategy called `name`.

    Args:
        name: "none" trains on the default device alone.
        batch_size: Of the whole job; the devices share it equally.

    Raises:
        DevicesError: The batch cannot be shared equally, or "none" was asked for in a
            job of several processes.
    """
    if name == "none":
        return _one_device()
    devices = jax.device_count()
    if batch_size % devices:
        raise DevicesError(
            f"batch_size is {batch_size} on {devices} devices; under --parallel {name}"
            " each takes an equal part. Choose a multiple, such as"
            f" --batch-size {-(-batch_size // devices) * devices}."
        )
    if name == "pmap":
        return _pmap()
    return _shard_map() if name == "shard_map" else _jit()


def per_device(params: PyTree, axis_name: str | None) -> PyTree:
    """Mark replicated parameters as each device's own, for differentiation.

    Gradients are then those of the device's own loss under every strategy. Otherwise
    `shard_map`, which knows that the parameters are the same everywhere, would hand
    back the sum over all devices, where `pmap` does not.
    """
    if axis_name is None:
        return params
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(params, axis_name, to="varying")
    return jax.tree.map(  # its name in jax 0.8
        lambda x: getattr(jax.lax, "pvary")(x, axis_name),  # noqa: B009
        params,
    )


def mean_over(tree: PyTree, axis_name: str | None) -> PyTree:
    """The mean over all devices; without an axis, `tree` itself."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def _unchanged(tree: PyTree) -> PyTree:
    return tree


def _one_device() -> Strategy:
    if jax.process_count() > 1:
        raise DevicesError(
            f"parallel is none in a job of {jax.process_count()} processes; each would"
            " train a network of its own. Choose --parallel pmap, shard_map or jit."
        )
    return Strategy(
        axis_name=None,
        place_state=_unchanged,
        place_batch=_unchanged,
        compile=lambda step: jax.jit(step, donate_argnums=0),
        fetch=_unchanged,
        replicate=_unchanged,
        share=_unchanged,
        devices=1,
    )


def _pmap() -> Strategy:
    local_devices = jax.local_device_count()
    # pmap's own output: committed to the devices like the states that follow it, so
    # that the first step is no compilation apart.
    replicate = jax.pmap(lambda _, state: state, axis_name=AXIS_NAME, in_axes=(0, None))

    def split(x: np.ndarray) -> np.ndarray:
        return x.reshape(local_devices, -1, *x.shape[1:])

    return Strategy(
        axis_name=AXIS_NAME,
        # By way of the host: pmap rejects arrays that are committed to one device.
        place_state=lambda state: replicate(
            np.arange(local_devices), jax.device_get(state)
        ),
        place_batch=lambda batch: jax.tree.map(split, batch),
        compile=lambda step: jax.pmap(
            step,
            axis_name=AXIS_NAME,
            out_axes=(0, None),  # metrics are the same everywhere
            donate_argnums=0,
        ),
        fetch=lambda state: jax.tree.map(
            lambda x: x.addressable_data(0).reshape(x.shape[1:]),
            # On CPU, work for one device queued behind a step in which the devices wait
            # for each other may take the thread that one of them needs.
            jax.block_until_ready(state),
        ),
        **_evaluation(),
    )


def _shard_map() -> Strategy:
    rows, replicated = _shardings()

    def compile_step(step: StepFn) -> StepFn:
        # check_vma stays on. It proves, while tracing, that the state comes out the
        # same on every device: the new statistics of a BatchNorm without axis_name,
        # or gradients nobody averaged, are errors. `per_device` is its price.
        mapped = jax.shard_map(
            step,
            mesh=rows.mesh,
            in_specs=(replicated.spec, rows.spec),
            out_specs=replicated.spec,
        )
        return jax.jit(mapped, donate_argnums=0)

    return _global_arrays(AXIS_NAME, compile_step)


def _jit() -> Strategy:
    _, replicated = _shardings()

    def compile_step(step: StepFn) -> StepFn:
        # Left to itself, the compiler might spread parts of the new state.
        return jax.jit(step, donate_argnums=0, out_shardings=replicated)

    return _global_arrays(None, compile_step)


def _shardings() -> tuple[NamedSharding, NamedSharding]:
    """Over one mesh of all devices: rows spread out, and replicated."""
    mesh = jax.make_mesh(
        (jax.device_count(),), (AXIS_NAME,), axis_types=(AxisType.Auto,)
    )
    rows, replicated = PartitionSpec(AXIS_NAME), PartitionSpec()
    return NamedSharding(mesh, rows), NamedSharding(mesh, replicated)


def _evaluation() -> dict[str, Any]:
    """What evaluation needs of a strategy on many devices."""

    def placing(sharding: NamedSharding) -> Callable[[PyTree], PyTree]:
        def place(x: Any) -> jax.Array:
            return jax.make_array_from_process_local_data(sharding, np.asarray(x))

        return lambda tree: jax.tree.map(place, tree)

    rows, replicated = map(placing, _shardings())
    return {"replicate": replicated, "share": rows, "devices": jax.device_count()}


def _global_arrays(
    axis_name: str | None, compile_step: Callable[[StepFn], StepFn]
) -> Strategy:
    evaluation = _evaluation()
    return Strategy(
        axis_name=axis_name,
        place_state=evaluation["replicate"],
        place_batch=evaluation["share"],
        compile=compile_step,
        fetch=lambda state: jax.tree.map(
            lambda x: x.addressable_data(0), jax.block_until_ready(state)
        ),
        **evaluation,
    )
