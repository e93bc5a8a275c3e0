"""An arm, assembled and compiled: its state, and the step from one to the next."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import models
from experiments.data.batches import Batch, TrainBatches
from experiments.data.dataset import Inputs
from experiments.models import Model
from experiments.training import losses, parallel
from experiments.training.optimizer import Optimizer, make_optimizer
from experiments.training.parallel import Strategy
from experiments.training.plans import Arm

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


StepFn = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class CompiledArm:
    """An arm, compiled once and run with every seed."""

    arm: Arm
    batches: TrainBatches
    learning_rates: np.ndarray  # [total steps] float32
    strategy: Strategy
    # From a PRNG key, or from the state that another arm ended with; not placed yet.
    init: Callable[..., TrainState]
    step: StepFn  # compiled; donates the state

    @property
    def steps_per_epoch(self) -> int:
        """Number of its steps in an epoch."""
        return self.batches.steps_per_epoch

    @property
    def steps(self) -> int:
        """Steps of a whole run."""
        return (self.arm.epochs - self.arm.first_epoch) * self.steps_per_epoch

    def epoch(self, step: int) -> int:
        """The epoch, from 1, of the arm's own step, from 1."""
        return self.arm.first_epoch + -(-step // self.steps_per_epoch)

    @property
    def abstract_state(self) -> TrainState:
        """Shapes and dtypes of the state, as a checkpoint has them."""
        return jax.eval_shape(self.init, jax.random.key(0))


def make_train_step(
    model: Model,
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

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
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
@functools.partial(jax.jit, static_argnames="model")
def _init_variables(model: nn.Module, key: jax.Array) -> PyTree:
    inputs = jnp.zeros((1, *model.data.shape), jnp.uint8)
    return model.init(key, inputs, train=False)


def compile_arm(
    arm: Arm,
    model: Model,
    data: Inputs,
    optimizer: Optimizer,
    batches: TrainBatches,
    strategy: Strategy,
) -> CompiledArm:
    """Assemble and jit an arm; nothing is computed yet.

    Args:
        arm: How long, at which rates, averaged when.
        model: The network's settings.
        data: What it is made for.
        optimizer: The optimizer's settings.
        batches: What it trains on.
        strategy: The devices.
    """
    plain = models.build(model, data)
    steps = batches.steps_per_epoch
    batch_stats = models.shapes(plain).get("batch_stats", {})
    made = make_optimizer(optimizer, arm, steps, batch_stats)
    # Compiled, so that the optimizer's counters are committed like the parameters.
    init_optimizer = jax.jit(made.init)

    def init(key: jax.Array, start: TrainState | None = None) -> TrainState:
        if start is None:
            variables = _init_variables(plain, key)
            params, batch_stats = variables["params"], variables.get("batch_stats", {})
            dropout_key = jax.random.key_data(jax.random.fold_in(key, 1))
        else:
            params, batch_stats, dropout_key = jax.tree.map(
                jnp.array, (start.params, start.batch_stats, start.key)
            )
        opt_state = init_optimizer(params)
        return TrainState(params, batch_stats, opt_state, dropout_key)

    axis_name = strategy.axis_name
    step = make_train_step(
        models.build(model, data, axis_name), made, axis_name, optimizer.label_smoothing
    )
    rates = arm.learning_rates(steps)
    return CompiledArm(arm, batches, rates, strategy, init, strategy.compile(step))
