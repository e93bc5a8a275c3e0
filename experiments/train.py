"""Training: the optimizers of both arms, the compiled step, and the loop around it."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import swa_jax
from experiments import data, parallel
from experiments.builders import Examples
from experiments.configs import Config
from experiments.models import ConvNet

PyTree = Any


class TrainState(NamedTuple):
    """All that a training step carries on."""

    params: PyTree
    batch_stats: PyTree  # running statistics of BatchNorm
    opt_state: optax.OptState


class Metrics(NamedTuple):
    """What a training step measures, before its update."""

    loss: jax.Array  # [] float32, mean cross-entropy of the batch
    accuracy: jax.Array  # [] float32, fraction of the batch classified correctly


class EpochReport(NamedTuple):
    """Means over one training epoch."""

    epoch: int  # 1-based
    loss: float
    accuracy: float
    learning_rate: float  # of the epoch's last step
    examples_per_second: float  # leaves out compilation and evaluation


StepFn = Callable[[TrainState, data.Batch], tuple[TrainState, Metrics]]


class Hooks:
    """What a caller may do while `train` runs; the methods here do nothing."""

    def on_step(self, step: int, loss: float, learning_rate: float) -> None:
        """See step number `step`, from 1, one step after it was dispatched."""

    def on_report(self, report: EpochReport) -> None:
        """See an epoch's means, one step into the next epoch."""

    def on_epoch_end(self, epoch: int, state: TrainState) -> None:
        """See the state at the end of an epoch, from 1; the next step donates it.

        It is on this process's first device, whatever the strategy.
        """


@dataclasses.dataclass(frozen=True)
class Arm:
    """One side of the comparison, compiled once and run with every seed."""

    swa_epochs: int  # 0: plain SGD
    steps_per_epoch: int
    learning_rates: np.ndarray  # [total steps] float32
    strategy: parallel.Strategy
    init: Callable[[jax.Array], TrainState]  # from a PRNG key; placed on all devices
    step: StepFn  # compiled; donates the state

    @property
    def name(self) -> str:
        """A short label for logs."""
        return f"swa{self.swa_epochs}" if self.swa_epochs else "sgd"


def make_model(config: Config, axis_name: str | None = None) -> ConvNet:
    """The experiment's network; `axis_name` synchronises its BatchNorm."""
    return ConvNet(config.widths, config.strides, config.pixel_max, axis_name=axis_name)


def make_schedule(config: Config, steps: int, swa_epochs: int) -> optax.Schedule:
    """Cosine to 0 for SGD; for SWA, cosine to `swa_lr`, constant while averaging.

    Args:
        config: Gives the rates and the total number of epochs.
        steps: Steps per epoch.
        swa_epochs: Length of the averaging window; 0 for SGD.
    """
    if swa_epochs == 0:
        return optax.cosine_decay_schedule(config.learning_rate, config.epochs * steps)
    return swa_jax.cosine_to_constant_schedule(
        config.learning_rate,
        config.swa_lr,
        decay_steps=(config.epochs - swa_epochs) * steps,
    )


def make_optimizer(
    config: Config, steps: int, swa_epochs: int
) -> optax.GradientTransformationExtraArgs:
    """SGD with momentum and weight decay; for SWA, averaging as the last link.

    Update number t, counted from 1, ends epoch t / steps, so the window's first
    sample, the end of epoch `epochs - swa_epochs + 1`, is that epoch times `steps`.
    """
    links = [
        # Normalisation makes scales and biases not worth decaying.
        optax.add_decayed_weights(
            config.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        ),
        optax.sgd(make_schedule(config, steps, swa_epochs), momentum=config.momentum),
    ]
    if swa_epochs:
        first = config.epochs - swa_epochs + 1
        links.append(swa_jax.swa(start_step=first * steps, period=steps))
    return optax.chain(*links)


def make_train_step(
    model: ConvNet,
    optimizer: optax.GradientTransformationExtraArgs,
    axis_name: str | None = None,
) -> StepFn:
    """Build the pure function (state, batch) -> (state, metrics); not yet compiled.

    Args:
        model: The network, made with the same `axis_name`.
        optimizer: Gets the mean of all devices' gradients.
        axis_name: Mapped axis of the devices, each with an equal part of the batch.
            None: the step sees the whole batch.
    """

    def train_step(state: TrainState, batch: data.Batch) -> tuple[TrainState, Metrics]:
        def loss_fn(params: PyTree) -> tuple[jax.Array, tuple[jax.Array, PyTree]]:
            logits, updated = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                batch["images"],
                train=True,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits, batch["labels"]
            )
            return jnp.mean(losses), (logits, updated["batch_stats"])

        (loss, (logits, batch_stats)), grads = jax.value_and_grad(
            loss_fn, has_aux=True
        )(parallel.per_device(state.params, axis_name))
        correct = jnp.argmax(logits, axis=-1) == batch["labels"]
        metrics = Metrics(loss, jnp.mean(correct, dtype=jnp.float32))
        grads, metrics = parallel.mean_over((grads, metrics), axis_name)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, batch_stats, opt_state), metrics

    return train_step


# Apart from the optimizer's, so that all arms share one compilation.
@functools.partial(jax.jit, static_argnames=("model", "image_shape"))
def _init_variables(
    model: ConvNet, key: jax.Array, image_shape: tuple[int, ...]
) -> PyTree:
    return model.init(key, jnp.zeros((1, *image_shape), jnp.uint8), train=False)


def make_arm(config: Config, examples: Examples, swa_epochs: int) -> Arm:
    """Assemble and jit one arm; `examples` gives the shapes and the epoch length.

    Raises:
        DevicesError: The settings do not fit this job's devices.
    """
    strategy = parallel.make_strategy(config.parallel, config.batch_size)
    model = make_model(config)
    steps = data.steps_per_epoch(len(examples.labels), config.batch_size)
    optimizer = make_optimizer(config, steps, swa_epochs)
    schedule = make_schedule(config, steps, swa_epochs)
    rates = jax.jit(jax.vmap(schedule))(jnp.arange(config.epochs * steps))
    # Compiled, so that the optimizer's counters are committed like the parameters.
    init_optimizer = jax.jit(optimizer.init)

    def init(key: jax.Array) -> TrainState:
        variables = _init_variables(model, key, examples.images.shape[1:])
        params = variables["params"]
        state = TrainState(params, variables["batch_stats"], init_optimizer(params))
        return strategy.place_state(state)

    axis_name = strategy.axis_name
    step = make_train_step(make_model(config, axis_name), optimizer, axis_name)
    return Arm(
        swa_epochs, steps, np.asarray(rates), strategy, init, strategy.compile(step)
    )


class _Meter:
    """Turns the metrics of steps, in order, into reports of epochs."""

    def __init__(self, arm: Arm, config: Config, hooks: Hooks) -> None:
        self._arm, self._config, self._hooks = arm, config, hooks
        self._metrics: list[Metrics] = []
        self._seconds = 0.0
        self._steps_timed = 0

    def add_time(self, seconds: float) -> None:
        self._seconds += seconds
        self._steps_timed += 1

    def add(self, step: int, metrics: Metrics) -> None:
        metrics = jax.device_get(metrics)
        rate = float(self._arm.learning_rates[step - 1])
        epoch = -(-step // self._arm.steps_per_epoch)
        if not np.isfinite(metrics.loss):
            raise FloatingPointError(
                f"loss is {metrics.loss} at step {step} (epoch {epoch} of"
                f" {self._config.epochs}, arm {self._arm.name}, learning rate"
                f" {rate:g}); lower --learning-rate or --swa-lr."
            )
        self._metrics.append(metrics)
        self._hooks.on_step(step, float(metrics.loss), rate)
        if step % self._arm.steps_per_epoch == 0:
            self._report(epoch, rate)

    def _report(self, epoch: int, rate: float) -> None:
        loss = np.mean([m.loss for m in self._metrics], dtype=np.float64)
        accuracy = np.mean([m.accuracy for m in self._metrics], dtype=np.float64)
        speed = self._steps_timed * self._config.batch_size / max(self._seconds, 1e-9)
        self._hooks.on_report(
            EpochReport(epoch, float(loss), float(accuracy), rate, speed)
        )
        self._metrics, self._seconds, self._steps_timed = [], 0.0, 0


def train(
    config: Config,
    arm: Arm,
    seed: int,
    examples: Examples,
    hooks: Hooks | None = None,
) -> TrainState:
    """Train one network from scratch.

    Args:
        config: The experiment.
        arm: From `make_arm`.
        seed: Decides the initial weights and the order of the data.
        examples: The train split.
        hooks: Called on the way.

    Returns:
        The final state, on this process's first device.

    Raises:
        FloatingPointError: A loss is NaN or infinite; the message names the step.
    """
    hooks = hooks or Hooks()
    state = arm.init(jax.random.key(seed))
    meter = _Meter(arm, config, hooks)
    pending: tuple[int, Metrics] | None = None
    clock = time.perf_counter()
    share = data.Share(jax.process_index(), jax.process_count())
    batches = data.train_batches(examples, config, seed, share)
    for step, batch in enumerate(batches, start=1):
        state, metrics = arm.step(state, arm.strategy.place_batch(batch))
        if pending is not None:
            # Waits for the previous step only: this one keeps the device busy.
            meter.add(*pending)
            meter.add_time(time.perf_counter() - clock)
        pending = step, metrics
        if step % arm.steps_per_epoch == 0:
            here = arm.strategy.fetch(state)
            hooks.on_epoch_end(step // arm.steps_per_epoch, here)
        clock = time.perf_counter()
    if pending is not None:
        meter.add(*pending)
    return arm.strategy.fetch(state)
