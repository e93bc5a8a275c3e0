"""Which arms an experiment has: how long, from where, at which rates, averaged when.

Three protocols:

- `side_by_side`: plain training and one arm for each averaging window, all from scratch
  and with the same number of epochs.
- `fine_tune`, that of the published ImageNet table: a baseline is trained to
  convergence; further epochs at a constant rate are averaged. Next to it stand a
  control that trains as many further epochs without averaging, at a rate of its own,
  and plain training with the whole budget from scratch.
- `budgets`, that of the original repository on CIFAR: plain training for each budget,
  and one SWA run whose average is read at the end of each.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import swa_jax
from experiments.settings import Config

Weights = Literal[
    "iterate",
    "average",
    "average, statistics averaged along",
    "average, no BatchNorm pass",
]


class Readout(NamedTuple):
    """A line of the results: which weights are scored when."""

    label: str
    method: Literal["sgd", "swa"]
    epoch: int  # at whose end
    weights: Weights


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way of training, run with every seed."""

    name: str  # of its directory and in logs
    label: str  # in figures
    epochs: int  # number of its last epoch
    # From steps per epoch to a schedule; step 0 is the arm's own first step.
    schedule: Callable[[int], optax.Schedule]
    readouts: tuple[Readout, ...]
    averages_from: int | None = None  # first epoch whose end is averaged
    parent: str | None = None  # arm whose final weights it starts from
    first_epoch: int = 0  # epochs that the parent trained

    def averages_at(self, epoch: int) -> bool:
        """Whether an average exists at the end of `epoch`."""
        return self.averages_from is not None and epoch >= self.averages_from


def make_arms(config: Config) -> tuple[Arm, ...]:
    """The arms of an experiment; parents come before their children."""
    if config.protocol == "side_by_side":
        return _side_by_side(config)
    return _fine_tune(config) if config.protocol == "fine_tune" else _budgets(config)


def has_batch_norm(config: Config) -> bool:
    """Whether the network has statistics that an average needs anew."""
    return config.model not in ("transformer", "vgg16")


def optimizer_name(config: Config) -> str:
    """As tables and figures call plain training."""
    return {"sgd": "SGD", "adamw": "AdamW"}[config.optimizer]


def _plural(epochs: int) -> str:
    return f"{epochs} epoch{'s' * (epochs != 1)}"


def _more(epochs: int) -> str:
    return _plural(epochs).replace(" ", " more ")


def _plain(config: Config, name: str, label: str, epochs: int) -> Arm:
    """Training from scratch with a cosine to 0, scored at its end."""
    return Arm(
        name=name,
        label=label,
        epochs=epochs,
        schedule=lambda steps: optax.cosine_decay_schedule(
            config.learning_rate, epochs * steps
        ),
        readouts=(Readout(label, "sgd", epochs, "iterate"),),
    )


def _average_readouts(config: Config, labels: dict[int, str]) -> tuple[Readout, ...]:
    """The average at the end of each epoch; at the last with other statistics, too."""
    found = [Readout(label, "swa", epoch, "average") for epoch, label in labels.items()]
    if has_batch_norm(config):
        last = found[-1]
        others: tuple[Weights, ...] = (
            "average, statistics averaged along",
            "average, no BatchNorm pass",
        )
        found += [
            last._replace(
                label=weights.replace("average", last.label, 1), weights=weights
            )
            for weights in others
        ]
    return tuple(found)


def _side_by_side(config: Config) -> tuple[Arm, ...]:
    sgd = optimizer_name(config)
    windows = sorted(config.swa_epochs)

    def averaged(window: int) -> Arm:
        readouts = _average_readouts(
            config, {config.epochs: f"SWA, last {_plural(window)}"}
        )
        return Arm(
            name=f"swa{window}",
            label=f"SWA, last {_plural(window)}",
            epochs=config.epochs,
            schedule=lambda steps: swa_jax.cosine_to_constant_schedule(
                config.learning_rate,
                config.swa_lr,
                decay_steps=(config.epochs - window) * steps,
            ),
            # Of the ablation without BatchNorm pass, the longest window's will do.
            readouts=readouts if window == windows[-1] else readouts[:1],
            averages_from=config.epochs - window + 1,
        )

    return (
        _plain(config, "sgd", sgd, config.epochs),
        *(averaged(window) for window in windows),
    )


def _fine_tune(config: Config) -> tuple[Arm, ...]:
    assert config.control_lr is not None
    sgd, start = optimizer_name(config), config.epochs
    windows = sorted(config.swa_epochs)
    swa_lr, control_lr = config.swa_lr, config.control_lr
    averages = {start + n: f"SWA, {_more(n)}" for n in windows}
    last = start + windows[-1]
    swa = Arm(
        name="swa",
        label=f"SWA at {swa_lr:g}",
        epochs=last,
        schedule=lambda _: optax.constant_schedule(swa_lr),
        readouts=(
            *_average_readouts(config, averages),
            Readout(f"SWA's last iterate ({swa_lr:g})", "sgd", last, "iterate"),
        ),
        averages_from=start + 1,
        parent="converged",
        first_epoch=start,
    )
    control = Arm(
        name="control",
        label=f"control at {control_lr:g}",
        epochs=last,
        schedule=lambda _: optax.constant_schedule(control_lr),
        readouts=tuple(
            Readout(
                f"control, {_more(n)} ({control_lr:g})",
                "sgd",
                start + n,
                "iterate",
            )
            for n in windows
        ),
        parent="converged",
        first_epoch=start,
    )
    return (
        _plain(config, "converged", f"{sgd}, {_plural(start)}", start),
        swa,
        control,
        *(
            _plain(config, f"sgd{start + n}", f"{sgd}, {_plural(start + n)}", start + n)
            for n in windows
        ),
    )


def _budgets(config: Config) -> tuple[Arm, ...]:
    assert config.budgets is not None
    assert config.swa_start is not None
    sgd, swa_start = optimizer_name(config), config.swa_start
    ends = {budget: int(budget * config.epochs) for budget in config.budgets}

    def plain(budget: float, epochs: int) -> Arm:
        label = f"{sgd}, {budget:g} budget{'s' * (budget != 1)}"
        return Arm(
            name=f"sgd{budget:g}",
            label=label,
            epochs=epochs,
            # The original repository ends at a hundredth of the first rate.
            schedule=lambda steps: swa_jax.linear_to_constant_schedule(
                config.learning_rate, 0.01 * config.learning_rate, epochs * steps
            ),
            readouts=(Readout(label, "sgd", epochs, "iterate"),),
        )

    labels = {
        epochs: f"SWA, {budget:g} budget{'s' * (budget != 1)}"
        for budget, epochs in ends.items()
    }
    swa = Arm(
        name="swa",
        label=f"SWA from epoch {swa_start}",
        epochs=max(ends.values()),
        schedule=lambda steps: swa_jax.linear_to_constant_schedule(
            config.learning_rate, config.swa_lr, swa_start * steps
        ),
        readouts=_average_readouts(config, labels),
        averages_from=swa_start,
    )
    return (*(plain(budget, epochs) for budget, epochs in ends.items()), swa)


def learning_rates(arm: Arm, steps_per_epoch: int) -> np.ndarray:
    """The rate of each of the arm's own steps, [steps] float32."""
    steps = (arm.epochs - arm.first_epoch) * steps_per_epoch
    rates = jax.jit(jax.vmap(arm.schedule(steps_per_epoch)))(jnp.arange(steps))
    # A constant schedule gives one number for all steps.
    return np.broadcast_to(np.asarray(rates, np.float32), (steps,))
