"""One process of a small data-parallel training run, which can be told where to die.

usage: python worker.py JSON, with the fields of ``Run``

The caller's environment says how many CPU devices the process has. The network is
replicated, the batch is divided over all devices of all processes, and so is the
average: each device keeps one part of it. Orbax saves the whole state every few steps,
in the background, and a new process goes on from the last save that it finds.

Two networks are trained side by side, which differ in how gradients are summed over the
devices, see ``GRADIENTS``. A run that goes straight through ends with averages that a
loop drives, see ``loops``.
"""

import dataclasses
import faulthandler
import functools
import json
import os
import pathlib
import sys
import threading
import time
import traceback
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import swa_jax

PyTree: TypeAlias = Any
Batch: TypeAlias = tuple[jax.Array, jax.Array]

STEPS = 12
SAVE_EVERY = 2
#: Averages after updates 3, 5, ..., 11: before each crash and after it.
START_STEP, PERIOD = 3, 2
SAMPLED = range(START_STEP, STEPS + 1, PERIOD)
BATCH, FEATURES, HIDDEN, CLASSES = 32, 12, 16, 4
LEARNING_RATE, MOMENTUM = 0.1, 0.9

#: Of the loops at the end: ``SWA(swa_start=0.5)`` averages epochs 2, 3 and 4.
EPOCHS, SWA_START = 5, 0.5

#: What a worker prints where it waits to be killed.
WAITING = "waiting to be killed"
#: Seconds after which a worker ends itself, should its parent not be there to do it.
LIFETIME = 300

#: Where to die: in a step between two saves, while both processes have written a save
#: and neither has made it valid, or when a save has just become valid.
Crash: TypeAlias = Literal["between saves", "during a save", "after a save"]
CRASH_STEP: dict[Crash, int] = {
    "between saves": 7,
    "during a save": 10,
    "after a save": 10,
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What one process is to do."""

    checkpoints: str
    result: str  # path without suffix: .npz takes the arrays, .json the rest
    processes: int
    index: int
    port: int
    crash: Crash | None = None


def main(run: Run) -> None:
    faulthandler.dump_traceback_later(LIFETIME, exit=True)
    if run.processes > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{run.port}",
            num_processes=run.processes,
            process_id=run.index,
        )
    train(run)
    if run.processes > 1:
        multihost_utils.sync_global_devices("end")
        jax.distributed.shutdown()


def train(run: Run) -> None:
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec("data"))
    tx = optax.chain(
        optax.sgd(LEARNING_RATE, momentum=MOMENTUM),
        swa_jax.swa(START_STEP, PERIOD, sharding=spread),
    )
    everywhere = NamedSharding(mesh, PartitionSpec())
    state = jax.jit(functools.partial(initial_state, tx))(
        jax.device_put(initial_params(), everywhere)
    )
    step_fn = jax.jit(functools.partial(train_step, tx, everywhere), donate_argnums=0)

    crash_step = CRASH_STEP[run.crash] if run.crash else None
    slow_host = SlowHost(run)
    manager = ocp.CheckpointManager(
        run.checkpoints,
        options=ocp.CheckpointManagerOptions(
            create=False,  # by the caller, before any process could race for it
            async_options=ocp.AsyncOptions(barrier_sync_fn=slow_host.barrier),
        ),
    )
    resumed_from = manager.latest_step() or 0
    if resumed_from:
        template = jax.tree.map(as_saved, state)
        restore = ocp.args.StandardRestore(template)
        state = manager.restore(resumed_from, args=restore)
    print("resumed from", resumed_from, flush=True)

    history = []
    for step in range(resumed_from + 1, STEPS + 1):
        batch = jax.tree.map(functools.partial(distribute, spread), make_batch(step))
        state = step_fn(state, batch)
        if step in SAMPLED:
            history.append(whole(parameters(state)))
        print("passed step", step, flush=True)
        if step % SAVE_EVERY == 0:
            if step == crash_step and run.crash == "during a save":
                manager.wait_until_finished()  # it is not the save before that waits
                slow_host.waits = True
            manager.save(step, args=ocp.args.StandardSave(state))
        if step == crash_step:
            if run.crash == "after a save":
                manager.wait_until_finished()
            if run.crash != "during a save":
                print(WAITING, flush=True)
            time.sleep(LIFETIME)
    manager.close()
    looped = {} if resumed_from else loops(everywhere, spread)
    write_result(run, state, history, resumed_from, looped)


class SlowHost:
    """Orbax's barrier between processes, at which the last process can be late.

    In the background a process comes to it when it has written its part. The first
    process makes the save valid when all have come.
    """

    def __init__(self, run: Run):
        self.waits = False
        self._is_last = run.index == run.processes - 1
        self._barrier = ocp.multihost.get_barrier_sync_fn()

    def barrier(self, *, key: str, timeout_ms: int) -> None:
        in_background = threading.current_thread() is not threading.main_thread()
        if self.waits and in_background:
            print(WAITING, flush=True)
            if self._is_last:
                time.sleep(LIFETIME)
        self._barrier(key=key, timeout_ms=timeout_ms)


def initial_params() -> dict[str, np.ndarray]:
    """Two layers; every leading axis divides by four."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    return {
        "w1": normal(FEATURES, HIDDEN) / np.float32(np.sqrt(FEATURES)),
        "w2": normal(HIDDEN, CLASSES) / np.float32(np.sqrt(HIDDEN)),
    }


def make_batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """The global batch of a step, the same whichever processes share it."""
    rng = np.random.default_rng((1, step))
    features = rng.standard_normal((BATCH, FEATURES), dtype=np.float32)
    return features, features[:, :CLASSES].argmax(axis=1).astype(np.int32)


def distribute(sharding: NamedSharding, x: np.ndarray) -> jax.Array:
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def loss_fn(params: PyTree, batch: Batch) -> jax.Array:
    features, labels = batch
    logits = jnp.tanh(features @ params["w1"]) @ params["w2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def all_reduced(params: PyTree, batch: Batch, everywhere: NamedSharding) -> PyTree:
    """As one trains: each device sums over its examples, an all-reduce does the rest.

    In which order depends on what connects the devices.
    """
    del everywhere
    return jax.grad(loss_fn)(params, batch)


def gathered(params: PyTree, batch: Batch, everywhere: NamedSharding) -> PyTree:
    """Every device gets every example's gradient, and sums in the order of examples.

    Hence the same bits whatever connects the devices.
    """

    def of_one(features: jax.Array, label: jax.Array) -> PyTree:
        return jax.grad(loss_fn)(params, (features[None], label[None]))

    grads = jax.lax.with_sharding_constraint(jax.vmap(of_one)(*batch), everywhere)
    return jax.tree.map(lambda grad: grad.mean(axis=0), grads)


GRADIENTS = {"all-reduced": all_reduced, "gathered": gathered}


def initial_state(tx: optax.GradientTransformation, params: PyTree) -> PyTree:
    network = {"params": params, "opt_state": tx.init(params)}
    return {"step": jnp.int32(0), "networks": dict.fromkeys(GRADIENTS, network)}


def train_step(
    tx: optax.GradientTransformation,
    everywhere: NamedSharding,
    state: PyTree,
    batch: Batch,
) -> PyTree:
    networks = {}
    for name, gradient in GRADIENTS.items():
        network = state["networks"][name]
        params = network["params"]
        grads = gradient(params, batch, everywhere)
        updates, opt_state = tx.update(grads, network["opt_state"], params)
        params = optax.apply_updates(params, updates)
        networks[name] = {"params": params, "opt_state": opt_state}
    return {"step": state["step"] + 1, "networks": networks}


def epoch_params(epoch: int) -> dict[str, np.ndarray]:
    """The weights at the end of an epoch of ``loops``."""
    rng = np.random.default_rng((2, epoch))
    return {name: rng.normal(size=x.shape) for name, x in initial_params().items()}


def loops(everywhere: NamedSharding, spread: NamedSharding) -> dict[str, PyTree]:
    """Averages outside a training step, whose arrays no process holds alone.

    ``update_average`` with weights and average divided over all devices, with weights
    on each and the average divided; then the published method, event by event.
    """

    def at_end(epoch: int, where: NamedSharding) -> PyTree:
        single = jax.tree.map(np.float32, epoch_params(epoch))
        return jax.tree.map(functools.partial(distribute, where), single)

    results: dict[str, PyTree] = {}
    for name, where in (("divided", spread), ("spread", everywhere)):
        params = at_end(0, where)
        average = swa_jax.init_average(params, sharding=spread)
        for epoch in range(EPOCHS):
            params = at_end(epoch, where)
            average = swa_jax.update_average(average, params)
        read = swa_jax.swa_params(average, params)
        assert all(x.sharding == where for x in jax.tree.leaves(read))
        for path, shapes in shard_shapes(average.avg_params).items():
            rows, columns = initial_params()[path[2:-2]].shape
            parts = [[rows // jax.device_count(), columns]] * jax.local_device_count()
            assert shapes == parts, (path, shapes)
        results[f"update_average {name}"] = {
            "read": whole(read),
            "counters": np.array([int(x) for x in average[:2]]),
        }
        results[f"SWA {name}"] = published(where, spread, at_end)
    return results


def published(where: NamedSharding, spread: NamedSharding, at_end: Any) -> PyTree:
    """``match`` and ``apply`` over a few epochs, with a statistic to recompute."""
    logged: list[float] = []

    def statistics(params: PyTree, batch_stats: PyTree, batch: Batch) -> PyTree:
        del params  # so that anybody can say what comes out
        features, _ = batch
        return {"mean": 0.9 * batch_stats["mean"] + 0.1 * features.mean(axis=0)}

    def batches() -> list[Batch]:
        place = functools.partial(distribute, spread)
        return [jax.tree.map(place, make_batch(step)) for step in range(3)]

    recipe = swa_jax.SWA(SWA_START, anneal_epochs=1, swa_lr=0.01)
    state = swa_jax.TrainingState(
        epoch=0,
        num_epochs=EPOCHS,
        params=at_end(0, where),
        batch_stats={"mean": jnp.zeros(FEATURES)},
        learning_rate=0.1,
    )
    state = recipe.apply(swa_jax.Event.TRAINING_START, state)
    matched = []
    for epoch in range(EPOCHS):
        state = state._replace(epoch=epoch, params=at_end(epoch, where))
        if recipe.match(swa_jax.Event.EPOCH_END, state):
            matched.append(epoch)
        state = recipe.apply(
            swa_jax.Event.EPOCH_END, state, lambda x: logged.append(x["swa/distance"])
        )
    state = recipe.apply(
        swa_jax.Event.TRAINING_END,
        state,
        batch_stats_fn=statistics,
        train_batches=batches,
    )
    return {
        "read": whole(state.params),
        "matched": np.array(matched),
        "distances": np.array(logged),
        "learning_rate": np.float32(state.learning_rate),
        "statistics": whole(state.batch_stats["mean"]),
    }


def parameters(state: PyTree) -> PyTree:
    return {name: network["params"] for name, network in state["networks"].items()}


def as_saved(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def whole(tree: PyTree) -> PyTree:
    """The global value of every array, on every host."""
    return multihost_utils.process_allgather(tree, tiled=True)


def write_result(
    run: Run, state: PyTree, history: list[PyTree], resumed_from: int, looped: PyTree
) -> None:
    averages = {
        name: swa_jax.swa_state(network["opt_state"]).avg_params
        for name, network in state["networks"].items()
    }
    arrays = by_path("state", whole(state)) | by_path("average", whole(averages))
    if history:
        stacked = jax.tree.map(lambda *xs: np.stack(xs), *history)
        arrays |= by_path("history", stacked)
    arrays |= by_path("loops", looped)
    # NumPy's types take any of them for `allow_pickle`.
    np.savez(run.result + ".npz", **arrays)  # type: ignore[arg-type]
    facts = {
        "resumed_from": resumed_from,
        "average_shards": shard_shapes(averages),
        "params_shards": shard_shapes(parameters(state)),
    }
    pathlib.Path(run.result + ".json").write_text(json.dumps(facts))


def by_path(name: str, tree: PyTree) -> dict[str, np.ndarray]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {name + jax.tree_util.keystr(path): leaf for path, leaf in flat}


def shard_shapes(tree: PyTree) -> dict[str, list[list[int]]]:
    """For each array, the shapes that this process's devices really hold."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path): [list(s.data.shape) for s in x.addressable_shards]
        for path, x in flat
    }


if __name__ == "__main__":
    try:
        main(Run(**json.loads(sys.argv[1])))
    except BaseException:
        # An ordinary end would first wait for the other process, which waits for this.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
