"""Three ways to compare averages with plain training, and the arms of each."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import optax

import swa_jax
from experiments.runtime.checks import (
    AT_LEAST_1,
    POSITIVE,
    check,
    check_settings,
)
from experiments.training.averages import Average, check_averages, parse
from experiments.training.optimizer import Optimizer
from experiments.training.plans import ABLATIONS, Arm, Plan, Readout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """Settings of any comparison."""

    epochs: int
    """Epochs of the plain arm: the whole run, the baseline's way to convergence, or one
    budget, as the protocol has it."""

    swa_lr: float
    """Constant learning rate of an SWA arm's averaging window."""

    def __post_init__(self) -> None:
        """Reject settings that cannot run, naming the setting and the rule."""
        check_settings(self, AT_LEAST_1, "epochs")
        check_settings(self, POSITIVE, "swa_lr")

    def plan(self, optimizer: Optimizer, batch_norm: bool) -> Plan:
        """The arms.

        Args:
            optimizer: Its peak rate is that of every arm that trains from scratch.
            batch_norm: Whether the network has statistics that an average needs anew.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windows(Protocol):
    """Settings of a comparison of several averaging windows."""

    swa_epochs: tuple[int, ...]
    """Averaging windows, in epochs: the last ones of an arm with as many epochs as the
    plain one, or, when fine-tuning, epochs on top of the converged baseline."""

    averages: tuple[str, ...] = ()
    """Other averages of the arm with the longest window, at no further training:
    ema:DECAY, power:SIGMA_REL (both of every step), posthoc:SIGMA_REL (from two of
    power), lawa:EPOCHS, swag:SAMPLES."""

    def _check_windows(self, last: float) -> None:
        check_averages(self.averages)
        check(
            len(self.swa_epochs) > 0,
            "swa_epochs is empty; name at least one averaging window, such as"
            " --swa-epochs 5 10.",
        )
        for window in self.swa_epochs:
            check(
                1 <= window <= last,
                f"swa_epochs contains {window} with epochs={self.epochs}; a window"
                " must be at least 1 and leave an epoch before it. Raise --epochs or"
                " shorten the window, as in --epochs 4 --swa-epochs 1 2.",
            )
        check(
            len(set(self.swa_epochs)) == len(self.swa_epochs),
            f"swa_epochs is {self.swa_epochs}; each window must appear once.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SideBySide(Windows):
    """Plain training and an arm for each window, from scratch, equally long."""

    early_stopping: bool = False
    """Score plain training also where its validation accuracy was best."""

    def __post_init__(self) -> None:
        """Reject settings that cannot run."""
        super().__post_init__()
        self._check_windows(self.epochs - 1)

    def plan(self, optimizer: Optimizer, batch_norm: bool) -> Plan:
        """Plain training first, then from the shortest window."""
        windows = sorted(self.swa_epochs)

        def averaged(window: int) -> Arm:
            label = f"SWA, last {plural(window)}"
            readouts = _average_readouts({self.epochs: label}, batch_norm)
            others = tuple(map(parse, self.averages))
            if others:
                readouts += (iterate(f"last iterate ({self.swa_lr:g})", self.epochs),)
            is_longest = window == windows[-1]
            return Arm(
                name=f"swa{window}",
                label=label,
                epochs=self.epochs,
                schedule=lambda steps: swa_jax.cosine_to_constant_schedule(
                    optimizer.learning_rate,
                    self.swa_lr,
                    decay_steps=(self.epochs - window) * steps,
                ),
                # Of the ablation without BatchNorm pass, the longest window's will do.
                readouts=(*readouts, *other_readouts(others, self.epochs))
                if is_longest
                else readouts[:1],
                averages_from=self.epochs - window + 1,
                tuned_by=("average",),
                others=others if is_longest else (),
            )

        plain = plain_arm(optimizer, "sgd", optimizer.title, self.epochs)
        if self.early_stopping:
            (last,) = plain.readouts
            label = f"{last.label}, stopped early"
            stopped = last._replace(label=label, stopped_early=True)
            plain = dataclasses.replace(plain, readouts=(last, stopped))
        return Plan((plain, *map(averaged, windows)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTune(Windows):
    """The published ImageNet table's: more epochs on a converged baseline.

    Next to SWA stand a control that trains as many further epochs without averaging, at
    a rate of its own, and plain training with the whole budget from scratch.
    """

    control_lr: float
    """Constant learning rate of the arm that trains on without averaging."""

    def __post_init__(self) -> None:
        """Reject settings that cannot run."""
        super().__post_init__()
        check_settings(self, POSITIVE, "control_lr")
        self._check_windows(math.inf)

    def plan(self, optimizer: Optimizer, batch_norm: bool) -> Plan:
        """The baseline, its children, then the whole budgets."""
        sgd, start = optimizer.title, self.epochs
        windows = sorted(self.swa_epochs)
        last = start + windows[-1]
        child: dict[str, Any] = {
            "epochs": last,
            "parent": "converged",
            "first_epoch": start,
        }
        averages = {start + n: f"SWA, {_more(n)}" for n in windows}
        others = tuple(map(parse, self.averages))
        swa = Arm(
            name="swa",
            label=f"SWA at {self.swa_lr:g}",
            schedule=lambda _: optax.constant_schedule(self.swa_lr),
            readouts=(
                *_average_readouts(averages, batch_norm),
                iterate(f"SWA's last iterate ({self.swa_lr:g})", last),
                *other_readouts(others, last),
            ),
            others=others,
            averages_from=start + 1,
            tuned_by=("average",),
            **child,
        )
        control = Arm(
            name="control",
            label=f"control at {self.control_lr:g}",
            schedule=lambda _: optax.constant_schedule(self.control_lr),
            readouts=tuple(
                iterate(f"control, {_more(n)} ({self.control_lr:g})", start + n)
                for n in windows
            ),
            **child,
        )
        baseline = plain_arm(optimizer, "converged", f"{sgd}, {plural(start)}", start)
        budgets = (
            plain_arm(optimizer, f"sgd{n}", f"{sgd}, {plural(n)}", n)
            for n in (start + window for window in windows)
        )
        return Plan((baseline, swa, control, *budgets))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budgets(Protocol):
    """The original repository's: plain training for each budget, and one SWA run.

    The run's average is read at the end of each.
    """

    budgets: tuple[float, ...]
    """Lengths of training, in units of `epochs`."""

    swa_start: int
    """First epoch, from 1, whose end is averaged."""

    def __post_init__(self) -> None:
        """Reject settings that cannot run."""
        super().__post_init__()
        check(
            len(self.budgets) > 0 and list(self.budgets) == sorted(set(self.budgets)),
            f"budgets is {self.budgets}; name at least one, in ascending order.",
        )
        first = int(self.budgets[0] * self.epochs)
        check(
            1 <= self.swa_start <= first,
            f"swa_start is {self.swa_start}, and the smallest of budgets={self.budgets}"
            f" with epochs={self.epochs} ends after epoch {first}; the first epoch to"
            " average must be from 1 to that, as in --epochs 10 --swa-start 8.",
        )

    def plan(self, optimizer: Optimizer, batch_norm: bool) -> Plan:
        """Plain training in ascending order, then SWA."""
        peak = optimizer.learning_rate
        ends = {budget: int(budget * self.epochs) for budget in self.budgets}

        def title(what: str, budget: float) -> str:
            return f"{what}, {budget:g} budget{'s' * (budget != 1)}"

        def plain(budget: float, epochs: int) -> Arm:
            label = title(optimizer.title, budget)
            return Arm(
                name=f"sgd{budget:g}",
                label=label,
                epochs=epochs,
                # The original repository ends at a hundredth of the first rate.
                schedule=lambda steps: swa_jax.linear_to_constant_schedule(
                    peak, 0.01 * peak, epochs * steps
                ),
                readouts=(iterate(label, epochs),),
            )

        labels = {epochs: title("SWA", budget) for budget, epochs in ends.items()}
        swa = Arm(
            name="swa",
            label=f"SWA from epoch {self.swa_start}",
            epochs=max(ends.values()),
            schedule=lambda steps: swa_jax.linear_to_constant_schedule(
                peak, self.swa_lr, self.swa_start * steps
            ),
            readouts=_average_readouts(labels, batch_norm),
            averages_from=self.swa_start,
            tuned_by=("average",),
        )
        return Plan((*(plain(*end) for end in ends.items()), swa))


def plural(epochs: int) -> str:
    """So many epochs, in words."""
    return f"{epochs} epoch{'s' * (epochs != 1)}"


def _more(epochs: int) -> str:
    return plural(epochs).replace(" ", " more ")


def iterate(label: str, epoch: int) -> Readout:
    """The weights themselves at the end of an epoch."""
    return Readout(label, "sgd", epoch, "iterate")


def plain_arm(optimizer: Optimizer, name: str, label: str, epochs: int) -> Arm:
    """Training from scratch with a cosine to 0, scored at its end."""

    def schedule(steps: int) -> optax.Schedule:
        return optax.cosine_decay_schedule(optimizer.learning_rate, epochs * steps)

    return Arm(name, label, epochs, schedule, (iterate(label, epochs),))


def _average_readouts(labels: dict[int, str], batch_norm: bool) -> tuple[Readout, ...]:
    """The average at the end of each epoch; at the last with other statistics, too."""
    found = [Readout(label, "swa", epoch, "average") for epoch, label in labels.items()]
    last = found[-1]
    for weights in ABLATIONS if batch_norm else ():
        label = weights.replace("average", last.label, 1)
        found.append(last._replace(label=label, weights=weights))
    return tuple(found)


def other_readouts(others: Iterable[Average], epoch: int) -> list[Readout]:
    """The averages beside SWA's at the end of an epoch."""
    return [
        Readout(each.label, each.name.partition(":")[0], epoch, each.name)
        for each in others
    ]
