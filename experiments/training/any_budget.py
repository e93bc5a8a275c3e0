"""One run for any budget, against a run for each; and the arms of that."""

import dataclasses

import optax

from experiments.runtime.checks import check
from experiments.training.averages import check_averages, parse
from experiments.training.optimizer import Optimizer
from experiments.training.plans import Arm, Plan, Readout
from experiments.training.protocols import (
    Protocol,
    iterate,
    other_readouts,
    plain_arm,
    plural,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnyBudget(Protocol):
    """One run at a constant rate, whose averages are read at the end of each budget.

    Against it stand, for each budget, a run whose rate falls to 0 along a cosine, and
    one at the constant rate that falls to 0 in the last part.
    """

    read_at: tuple[int, ...]
    """The budgets, in epochs; the last one is `epochs`."""

    averages: tuple[str, ...]
    """What is read: ema:DECAY, power:SIGMA_REL, posthoc:SIGMA_REL, lawa:EPOCHS or
    swag:SAMPLES."""

    peaks: tuple[float, ...] = ()
    """Peak rate of each budget's cosine. Empty: `learning_rate` for all."""

    cooldown: float = 0.2
    """Share of a budget in which the constant rate falls to 0."""

    def __post_init__(self) -> None:
        """Reject settings that cannot run."""
        super().__post_init__()
        check_averages(self.averages)
        check(
            list(self.read_at) == sorted(set(self.read_at))
            and min(self.read_at, default=0) >= 1
            and self.read_at[-1] == self.epochs,
            f"read_at is {self.read_at} with epochs={self.epochs}; name budgets from 1"
            " in ascending order, of which the last one is epochs, as in --epochs 10"
            " --read-at 5 10.",
        )
        check(
            len(self.peaks) in (0, len(self.read_at))
            and all(p > 0 for p in self.peaks),
            f"peaks is {self.peaks}; give a rate above 0 for each of read_at, which is"
            f" {self.read_at}, or none.",
        )
        check(
            0 < self.cooldown < 1,
            f"cooldown is {self.cooldown}; it must be between 0 and 1.",
        )

    def plan(self, optimizer: Optimizer, batch_norm: bool) -> Plan:
        """The runs of single budgets in ascending order, then the one for all."""
        rate, others = self.swa_lr, tuple(map(parse, self.averages))

        def annealed(epochs: int, peak: float) -> Arm:
            label = f"{optimizer.title}, {plural(epochs)}"
            peaked = dataclasses.replace(optimizer, learning_rate=peak)
            return plain_arm(peaked, f"sgd{epochs}", label, epochs)

        def cooled(epochs: int) -> Arm:
            label = f"{rate:g} cooled down, {plural(epochs)}"

            def schedule(steps: int) -> optax.Schedule:
                last = round(self.cooldown * epochs * steps)
                first = epochs * steps - last
                return optax.linear_schedule(rate, 0.0, last, first)

            readouts = (iterate(label, epochs),)
            return Arm(f"cooldown{epochs}", label, epochs, schedule, readouts)

        def read(epochs: int) -> list[Readout]:
            found = [
                iterate(f"last iterate ({rate:g})", epochs),
                Readout("mean of every epoch", "swa", epochs, "average"),
                *other_readouts(others, epochs),
            ]
            return [r._replace(label=f"{r.label}, {plural(epochs)}") for r in found]

        constant = Arm(
            name="constant",
            label=f"constant rate {rate:g}",
            epochs=self.epochs,
            schedule=lambda _: optax.constant_schedule(rate),
            readouts=tuple(r for epochs in self.read_at for r in read(epochs)),
            averages_from=1,
            others=others,
            tuned_by=self.averages,
        )
        peaks = self.peaks or [optimizer.learning_rate] * len(self.read_at)
        cosines, cooldowns = (
            map(annealed, self.read_at, peaks),
            map(cooled, self.read_at),
        )
        return Plan((*cooldowns, *cosines, constant))
