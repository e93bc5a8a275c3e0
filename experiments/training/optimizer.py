"""The optimizer that arms share, and the average at its end."""

import dataclasses
from typing import Annotated, Any, Literal

import jax
import optax
import tyro

import swa_jax
from experiments.runtime.checks import NOT_NEGATIVE, POSITIVE, SHARE, check_settings
from experiments.training.plans import Arm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Settings of every arm."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW with decoupled weight decay."""

    learning_rate: float
    """Peak learning rate."""

    momentum: float = 0.9
    """Momentum of SGD, and AdamW's beta1."""

    weight_decay: float
    """L2 penalty on kernels (AdamW: decoupled decay)."""

    decay_all: Annotated[bool, tyro.conf.Suppress] = False
    """Whether biases and normalisation are decayed too, as the original code does."""

    label_smoothing: float = 0.0
    """Share of each target that is spread evenly over all classes, in [0, 1)."""

    def __post_init__(self) -> None:
        """Reject settings that cannot run, naming the setting and the rule."""
        check_settings(self, POSITIVE, "learning_rate")
        check_settings(self, NOT_NEGATIVE, "momentum", "weight_decay")
        check_settings(self, SHARE, "label_smoothing")

    @property
    def title(self) -> str:
        """As tables and figures call plain training."""
        return {"sgd": "SGD", "adamw": "AdamW"}[self.optimizer]


def make_optimizer(
    settings: Optimizer, arm: Arm, steps: int, batch_stats: Any
) -> optax.GradientTransformationExtraArgs:
    """The arm's optimizer; where it averages, averages are the last links.

    SWA averages the statistics of BatchNorm along, which cost next to nothing.

    Update number t, counted from 1, ends the arm's epoch t / steps, so its first sample
    is the first averaged epoch's number, counted from the arm's own start, times
    `steps`.
    """

    def decayed(params: Any) -> Any:
        # Normalisation makes scales and biases not worth decaying.
        return jax.tree.map(lambda p: settings.decay_all or p.ndim > 1, params)

    schedule, decay = arm.schedule(steps), settings.weight_decay
    if settings.optimizer == "adamw":
        b1 = settings.momentum
        links = [optax.adamw(schedule, b1=b1, weight_decay=decay, mask=decayed)]
    else:
        links = [
            optax.add_decayed_weights(decay, mask=decayed),
            optax.sgd(schedule, momentum=settings.momentum),
        ]
    if arm.averages_from is not None:
        first = arm.averages_from - arm.first_epoch
        average = swa_jax.swa(start_step=first * steps, period=steps)
        links.append(swa_jax.with_batch_stats(average, batch_stats))
        others = [
            (each.name, each.make(first * steps, steps))
            for each in arm.others
            if each.make is not None
        ]
        if others:
            return optax.named_chain(("optimizer", optax.chain(*links)), *others)
    return optax.chain(*links)
