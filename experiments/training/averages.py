"""The averages that an arm keeps beside SWA's, by what settings call them."""

from collections.abc import Callable
from typing import NamedTuple

import optax

import swa_jax
from experiments.runtime.checks import check

# From the update whose weights SWA takes first, and the steps in an epoch.
Make = Callable[[int, int], optax.GradientTransformationExtraArgs]

_FORMS = "ema:DECAY, power:SIGMA_REL, lawa:EPOCHS or swag:SAMPLES"
# Columns of SWAG's low-rank part, as in Maddox et al., arXiv:1902.02476.
_SWAG_RANK = 20


class Average(NamedTuple):
    """An average: a link of the optimizer, and how results name what is read of it."""

    name: str  # in settings, of the link and in results
    label: str  # in tables
    make: Make
    samples: int = 0  # whose predictions are averaged. 0: it is one network


def parse(name: str) -> Average:
    """The average that a setting names.

    EMA and power EMA take every step from the first; LAWA and SWAG the ends of epochs,
    LAWA all of them and SWAG those that SWA takes.

    Raises:
        ValueError: It names none.
    """
    kind, _, text = name.partition(":")
    try:
        found = _KINDS[kind](name, text)
        found.make(1, 1)  # the library's own checks of the number
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"averages contains {name!r}; write each as {_FORMS}, such as ema:0.99"
            f" ({error})."
        ) from error
    return found


def check_averages(names: tuple[str, ...]) -> None:
    """Raise ValueError for what names no average, and for what stands twice."""
    labels = [parse(name).label for name in names]
    check(
        len(set(labels)) == len(labels),
        f"averages is {names}; each must appear once.",
    )


def _ema(name: str, text: str) -> Average:
    decay = float(text)
    return Average(name, f"EMA {decay:g}", lambda first, steps: swa_jax.ema(decay))


def _power(name: str, text: str) -> Average:
    width = float(text)
    return Average(
        name, f"power EMA {width:g}", lambda first, steps: swa_jax.power_ema(width)
    )


def _lawa(name: str, text: str) -> Average:
    epochs = int(text)
    return Average(
        name,
        f"LAWA, {epochs} epochs",
        lambda first, steps: swa_jax.lawa(epochs, start_step=steps, period=steps),
    )


def _swag(name: str, text: str) -> Average:
    samples = int(text)
    check(samples >= 1, "it takes at least 1 sample")
    return Average(
        name,
        f"SWAG, {samples} samples",
        lambda first, steps: swa_jax.swag(_SWAG_RANK, first, steps),
        samples,
    )


_KINDS: dict[str, Callable[[str, str], Average]] = {
    "ema": _ema,
    "power": _power,
    "lawa": _lawa,
    "swag": _swag,
}
