"""Training: the optimizer of an arm, the compiled step, and the loop around it."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import swa_jax
from experiments import data, losses, parallel, plans
from experiments.networks import make_model
from experiments.plans import Arm
from experiments.settings import Config

PyTree = Any


class TrainState(NamedTuple):
    """All that a training step carries on."""

    params: PyTree
    batch_stats: PyTree  # running statistics of BatchNorm; empty without it
    opt_state: optax.OptState
    key: jax.Array  # [2] uint32, PRNG key of dropout


class Metrics(NamedTuple):
    """What a training step measures, before its update."""

    loss: jax.Array  # [] float32, mean loss of the batch
    accuracy: jax.Array  # [] float32, fraction of the batch's labels found


class EpochReport(NamedTuple):
    """Means over one training epoch."""

    epoch: int  # 1-based
    step: int  # number of its last step, in the arm
    loss: float
    accuracy: float
    learning_rate: float  # of the epoch's last step
    examples_per_second: float  # leaves out compilation and evaluation


class Snapshot(NamedTuple):
    """A run between two steps: all that is needed to go on as if never stopped."""

    step: int  # steps done
    state: TrainState  # on the host, or on this process's first device
    # Loss and accuracy of this epoch's steps so far; the snapshot's own.
    metrics: list[tuple[float, float]]


StepFn = Callable[[TrainState, data.Batch], tuple[TrainState, Metrics]]


class Hooks:
    """What a caller may do while `train` runs; the methods here do nothing."""

    def on_step(self, step: int, loss: float, learning_rate: float) -> None:
        """See step number `step`, from 1, one step after it was dispatched."""

    def on_report(self, report: EpochReport) -> None:
        """See an epoch's means, before `on_epoch_end`."""

    def on_epoch_end(self, epoch: int, state: TrainState) -> None:
        """See the state at the end of an epoch, from 1; the next step donates it.

        It is on this process's first device, whatever the strategy.
        """

    def saves_after(self, step: int) -> bool:
        """Whether `on_snapshot` wants to see the run as it is after `step`."""
        return False

    def on_snapshot(self, snapshot: Snapshot) -> None:
        """Save a run; its arrays and its list are the caller's own."""


@dataclasses.dataclass(frozen=True)
class CompiledArm:
    """An arm, compiled once and run with every seed."""

    arm: Arm
    steps_per_epoch: int
    learning_rates: np.ndarray  # [total steps] float32
    strategy: parallel.Strategy
    # From a PRNG key, or from the state that another arm ended with; not placed yet.
    init: Callable[..., TrainState]
    step: StepFn  # compiled; donates the state

    @property
    def steps(self) -> int:
        """Steps of a whole run."""
        return (self.arm.epochs - self.arm.first_epoch) * self.steps_per_epoch


def make_optimizer(
    config: Config, arm: Arm, steps: int, batch_stats: PyTree
) -> optax.GradientTransformationExtraArgs:
    """The arm's optimizer; where it averages, averaging is the last link.

    It averages the statistics of BatchNorm along, which cost next to nothing.

    Update number t, counted from 1, ends the arm's epoch t / steps, so its first sample
    is the first averaged epoch's number, counted from the arm's own start, times
    `steps`.
    """

    def decayed(params: PyTree) -> PyTree:
        # Normalisation makes scales and biases not worth decaying.
        return jax.tree.map(lambda p: config.decay_all or p.ndim > 1, params)

    schedule = arm.schedule(steps)
    if config.optimizer == "adamw":
        links = [
            optax.adamw(
                schedule,
                b1=config.momentum,
                weight_decay=config.weight_decay,
                mask=decayed,
            )
        ]
    else:
        links = [
            optax.add_decayed_weights(config.weight_decay, mask=decayed),
            optax.sgd(schedule, momentum=config.momentum),
        ]
    if arm.averages_from is not None:
        first = arm.averages_from - arm.first_epoch
        average = swa_jax.swa(start_step=first * steps, period=steps)
        links.append(swa_jax.with_batch_stats(average, batch_stats))
    return optax.chain(*links)


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformationExtraArgs,
    axis_name: str | None = None,
    label_smoothing: float = 0.0,
) -> StepFn:
    """Build the pure function (state, batch) -> (state, metrics); not yet compiled.

    Args:
        model: The network, made with the same `axis_name`.
        optimizer: Gets the mean of all devices' gradients.
        axis_name: Mapped axis of the devices, each with an equal part of the batch.
            None: the step sees the whole batch.
        label_smoothing: Share of each target spread evenly over all classes.
    """
    drops = bool(getattr(model, "dropout", 0))

    def dropout_keys(key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        if not drops:
            return key, {}
        key, dropout = jax.random.split(jax.random.wrap_key_data(key))
        if axis_name is not None:  # devices drop independently of each other
            dropout = jax.random.fold_in(dropout, jax.lax.axis_index(axis_name))
        return jax.random.key_data(key), {"dropout": dropout}

    def train_step(state: TrainState, batch: data.Batch) -> tuple[TrainState, Metrics]:
        key, rngs = dropout_keys(state.key)

        def loss_fn(params: PyTree) -> tuple[jax.Array, tuple[jax.Array, PyTree]]:
            logits, updated = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                losses.mixed_inputs(batch),
                train=True,
                mutable=["batch_stats"],
                rngs=rngs,
            )
            loss = losses.mean_loss(logits, batch, label_smoothing)
            return loss, (logits, updated.get("batch_stats", {}))

        (loss, (logits, batch_stats)), grads = jax.value_and_grad(
            loss_fn, has_aux=True
        )(parallel.per_device(state.params, axis_name))
        correct = jnp.argmax(logits, axis=-1) == batch["labels"]
        metrics = Metrics(loss, jnp.mean(correct, dtype=jnp.float32))
        grads, metrics = parallel.mean_over((grads, metrics), axis_name)
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params, batch_stats=batch_stats
        )
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, batch_stats, opt_state, key), metrics

    return train_step


# Apart from the optimizer's, so that all arms share one compilation.
@functools.partial(jax.jit, static_argnames=("model", "input_shape", "input_dtype"))
def _init_variables(
    model: nn.Module, key: jax.Array, input_shape: tuple[int, ...], input_dtype: Any
) -> PyTree:
    return model.init(key, jnp.zeros((1, *input_shape), input_dtype), train=False)


def _variables(model: nn.Module, split: data.Split, key: jax.Array) -> PyTree:
    """A network's parameters and statistics for a split's inputs."""
    return _init_variables(model, key, split.input_shape, np.dtype(split.input_dtype))


def compile_arm(config: Config, arm: Arm, split: data.Split) -> CompiledArm:
    """Assemble and jit an arm; `split` gives the shapes and the epoch length.

    Raises:
        DevicesError: The settings do not fit this job's devices.
    """
    strategy = parallel.make_strategy(config.parallel, config.batch_size)
    model = make_model(config, split)
    steps = data.steps_per_epoch(split.num_examples, config.batch_size)
    like = jax.eval_shape(lambda: _variables(model, split, jax.random.key(0)))
    optimizer = make_optimizer(config, arm, steps, like.get("batch_stats", {}))
    # Compiled, so that the optimizer's counters are committed like the parameters.
    init_optimizer = jax.jit(optimizer.init)

    def init(key: jax.Array, start: TrainState | None = None) -> TrainState:
        if start is None:
            variables = _variables(model, split, key)
            params, batch_stats = variables["params"], variables.get("batch_stats", {})
            dropout_key = jax.random.key_data(jax.random.fold_in(key, 1))
        else:
            params, batch_stats, dropout_key = jax.tree.map(
                jnp.array, (start.params, start.batch_stats, start.key)
            )
        opt_state = init_optimizer(params)
        return TrainState(params, batch_stats, opt_state, dropout_key)

    step = make_train_step(
        make_model(config, split, strategy.axis_name),
        optimizer,
        strategy.axis_name,
        config.label_smoothing,
    )
    rates = plans.learning_rates(arm, steps)
    return CompiledArm(arm, steps, rates, strategy, init, strategy.compile(step))


class _Meter:
    """Turns the metrics of steps, in order, into reports of epochs."""

    def __init__(
        self,
        compiled: CompiledArm,
        config: Config,
        hooks: Hooks,
        metrics: list[tuple[float, float]],
    ) -> None:
        self._compiled, self._config, self._hooks = compiled, config, hooks
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
        epoch = compiled.arm.first_epoch + -(-step // compiled.steps_per_epoch)
        if not np.isfinite(metrics.loss):
            raise not_finite(f"loss is {metrics.loss}", compiled, step)
        self.metrics.append((float(metrics.loss), float(metrics.accuracy)))
        self._hooks.on_step(step, float(metrics.loss), rate)
        if step % compiled.steps_per_epoch == 0:
            self._report(epoch, step, rate)

    def _report(self, epoch: int, step: int, rate: float) -> None:
        loss, accuracy = np.mean(np.array(self.metrics, np.float64), axis=0).tolist()
        speed = self._steps_timed * self._config.batch_size / max(self._seconds, 1e-9)
        self._hooks.on_report(EpochReport(epoch, step, loss, accuracy, rate, speed))
        self.metrics, self._seconds, self._steps_timed = [], 0.0, 0


def not_finite(what: str, compiled: CompiledArm, step: int) -> FloatingPointError:
    """The error of a run that left the numbers behind; it names step and rate."""
    arm = compiled.arm
    epoch = arm.first_epoch + -(-step // compiled.steps_per_epoch)
    return FloatingPointError(
        f"{what} at step {step} (epoch {epoch} of {arm.epochs}, arm {arm.name},"
        f" learning rate {compiled.learning_rates[step - 1]:g}); lower --learning-rate"
        " or --swa-lr."
    )


def train(
    config: Config,
    compiled: CompiledArm,
    seed: int,
    split: data.Split,
    hooks: Hooks | None = None,
    *,
    start: TrainState | None = None,
    resume: Snapshot | None = None,
) -> TrainState:
    """Train one network.

    Args:
        config: The experiment.
        compiled: From `compile_arm`.
        seed: Decides the initial weights and the order of the data.
        split: The train split.
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
    meter = _Meter(compiled, config, hooks, resume.metrics if resume else [])
    clock = time.perf_counter()
    batches = data.train_batches(
        split,
        config,
        seed,
        data.Share(jax.process_index(), jax.process_count()),
        first_step=arm.first_epoch * steps + done,
        last_step=arm.epochs * steps,
    )
    for step, batch in enumerate(batches, start=done + 1):
        state, metrics = compiled.step(state, strategy.place_batch(batch))
        # Waits for the previous step only: this one keeps the device busy.
        meter.swap(step, metrics, clock)
        if step % steps == 0:
            # A NaN must not reach the scores, nor the BatchNorm pass of an average.
            meter.flush()
            here = strategy.fetch(state)
            _check_finite(here, compiled, step)
            hooks.on_epoch_end(arm.first_epoch + step // steps, here)
        if hooks.saves_after(step):
            meter.flush()
            here = strategy.fetch(state)
            _check_finite(here, compiled, step)
            # Copied: the next step overwrites the buffers.
            here = jax.tree.map(np.array, jax.device_get(here))
            hooks.on_snapshot(Snapshot(step, here, list(meter.metrics)))
        clock = time.perf_counter()
    return strategy.fetch(state)


def _check_finite(state: TrainState, compiled: CompiledArm, step: int) -> None:
    """Look for what the loss has not shown yet: it is that of the step's start."""
    average = (
        swa_jax.swa_state(state.opt_state)
        if compiled.arm.averages_from is not None
        else None
    )
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
