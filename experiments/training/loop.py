"""The loop around the training step."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import swa_jax
from experiments.training.step import CompiledArm, Metrics, TrainState

PyTree = Any


class EpochReport(NamedTuple):
    """Means over one training epoch."""

    epoch: int  # 1-based
    step: int  # number of its last step, in the arm
    batch_loss: float  # of the steps' batches, each before its update
    batch_accuracy: float
    learning_rate: float  # of the epoch's last step
    examples_per_second: float  # leaves out compilation and evaluation


class Snapshot(NamedTuple):
    """A run between two steps: all that is needed to go on as if never stopped."""

    step: int  # steps done
    state: TrainState  # on the host, or on this process's first device
    # Loss and accuracy of this epoch's steps so far; the snapshot's own.
    metrics: list[tuple[float, float]]


class Hooks:
    """What a caller may do while `train` runs; the methods here do nothing."""

    def on_step(self, step: int, loss: float, learning_rate: float) -> None:
        """See step number `step`, from 1, one step after it was dispatched."""

    def on_report(self, report: EpochReport) -> None:
        """See an epoch's means, before `on_epoch_end`."""

    def on_epoch_end(self, epoch: int, step: int, state: TrainState) -> None:
        """See the state at the end of an epoch, from 1; the next step donates it.

        It is on this process's first device, whatever the strategy.
        """

    def after_step(self, step: int, snapshot: Callable[[], Snapshot]) -> None:
        """Do what is to be done between two steps.

        `snapshot` waits for the step and copies the run; its arrays and its list are
        the caller's own.
        """


class _Meter:
    """Turns the metrics of steps, in order, into reports of epochs."""

    def __init__(
        self, compiled: CompiledArm, hooks: Hooks, metrics: list[tuple[float, float]]
    ) -> None:
        self._compiled, self._hooks = compiled, hooks
        self.metrics = list(metrics)  # of this epoch
        self._pending: tuple[int, Metrics] | None = None
        self._seconds = 0.0
        self._steps_timed = 0
        self._is_compiled = False  # the first step is, while it is dispatched

    def swap(self, step: int, metrics: Metrics, clock: float) -> None:
        """Take a step's metrics; wait for those of the step before.

        Args:
            step: Its number.
            metrics: Not there yet: the step was only just dispatched.
            clock: When the loop turned to this step.
        """
        if self._is_compiled:
            self._seconds += time.perf_counter() - clock
        self._is_compiled = True
        self.flush()
        self._pending = step, metrics

    def flush(self) -> None:
        """Wait for the metrics taken last."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        clock = time.perf_counter()
        metrics = jax.device_get(metrics)
        self._seconds += time.perf_counter() - clock
        self._steps_timed += 1
        self._add(step, metrics)

    def _add(self, step: int, metrics: Metrics) -> None:
        compiled = self._compiled
        rate = float(compiled.learning_rates[step - 1])
        if not np.isfinite(metrics.loss):
            raise not_finite(f"loss is {metrics.loss}", compiled, step)
        self.metrics.append((float(metrics.loss), float(metrics.accuracy)))
        self._hooks.on_step(step, float(metrics.loss), rate)
        if step % compiled.steps_per_epoch == 0:
            self._report(compiled.epoch(step), step, rate)

    def _report(self, epoch: int, step: int, rate: float) -> None:
        loss, accuracy = np.mean(np.array(self.metrics, np.float64), axis=0).tolist()
        examples = self._steps_timed * self._compiled.batches.batch_size
        speed = examples / max(self._seconds, 1e-9)
        self._hooks.on_report(EpochReport(epoch, step, loss, accuracy, rate, speed))
        self.metrics, self._seconds, self._steps_timed = [], 0.0, 0


def not_finite(what: str, compiled: CompiledArm, step: int) -> FloatingPointError:
    """The error of a run that left the numbers behind; it names step and rate."""
    arm = compiled.arm
    return FloatingPointError(
        f"{what} at step {step} (epoch {compiled.epoch(step)} of {arm.epochs}, arm"
        f" {arm.name}, learning rate {compiled.learning_rates[step - 1]:g}); lower"
        " --learning-rate or --swa-lr."
    )


def train(
    compiled: CompiledArm,
    seed: int,
    hooks: Hooks | None = None,
    *,
    start: TrainState | None = None,
    resume: Snapshot | None = None,
) -> TrainState:
    """Train one network.

    Args:
        compiled: From `compile_arm`.
        seed: Decides the initial weights and the order of the data.
        hooks: Called on the way.
        start: What the arm's parent ended with. None: weights drawn from `seed`.
        resume: Where the same run stopped; the rest is then done as it would have been.

    Returns:
        The final state, on this process's first device.

    Raises:
        FloatingPointError: A loss, or something in the state at an epoch's end or to be
            saved, is NaN or infinite; the message names the step.
    """
    hooks = hooks or Hooks()
    arm, strategy, steps = compiled.arm, compiled.strategy, compiled.steps_per_epoch
    if resume is None:
        done, state = 0, compiled.init(jax.random.key(seed), start)
    else:
        done, state = resume.step, jax.tree.map(jnp.array, resume.state)
    state = strategy.place_state(state)
    meter = _Meter(compiled, hooks, resume.metrics if resume else [])

    def here() -> TrainState:
        """The state, on one device, once its step has turned out well."""
        meter.flush()
        found = strategy.fetch(state)
        _check_finite(found, compiled, step)
        return found

    def snapshot() -> Snapshot:
        # Copied: the next step overwrites the buffers.
        copy = jax.tree.map(np.array, jax.device_get(here()))
        return Snapshot(step, copy, list(meter.metrics))

    clock = time.perf_counter()
    batches = compiled.batches.read(
        seed, arm.first_epoch * steps + done, arm.epochs * steps
    )
    for step, batch in enumerate(batches, start=done + 1):
        state, metrics = compiled.step(state, strategy.place_batch(batch))
        # Waits for the previous step only: this one keeps the device busy.
        meter.swap(step, metrics, clock)
        if step % steps == 0:
            # A NaN must not reach the scores, nor the BatchNorm pass of an average.
            hooks.on_epoch_end(compiled.epoch(step), step, here())
        hooks.after_step(step, snapshot)
        clock = time.perf_counter()
    return strategy.fetch(state)


def _check_finite(state: TrainState, compiled: CompiledArm, step: int) -> None:
    """Look for what the loss has not shown yet: it is that of the step's start."""
    average = swa_jax.swa_state(state.opt_state) if compiled.arm.averages else None
    finite = _finite(state.params, state.batch_stats, average)
    for what, holds in jax.device_get(finite).items():
        if not holds:
            raise not_finite(f"{what} is not finite", compiled, step)


@jax.jit
def _finite(
    params: PyTree, batch_stats: PyTree, average: swa_jax.SWAState | None
) -> dict[str, jax.Array]:
    """Whether each part of a state is finite, in one pass on the device."""

    def holds(tree: PyTree) -> jax.Array:
        floats = [
            leaf
            for leaf in jax.tree.leaves(tree)
            if jnp.issubdtype(leaf.dtype, jnp.inexact)
        ]
        each = [jnp.all(jnp.isfinite(leaf)) for leaf in floats]
        return jnp.all(jnp.array(each, dtype=bool))

    found = {"a weight": holds(params), "a BatchNorm statistic": holds(batch_stats)}
    if average is not None:  # its mean says nothing before the first sample
        found["an average"] = (average.num_averaged == 0) | holds(average.avg_params)
    return found
