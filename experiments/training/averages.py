"""The averages that an arm keeps beside SWA's, by what settings call them."""

from collections.abc import Callable
from typing import NamedTuple

import optax

import swa_jax
from experiments.runtime.checks import check

# From the update whose weights SWA takes first, and the steps in an epoch.
Make = Callable[[int, int], optax.GradientTransformationExtraArgs]

_FORMS = "ema:DECAY, power:SIGMA_REL, posthoc:SIGMA_REL, lawa:EPOCHS or swag:SAMPLES"
# Columns of SWAG's low-rank part, as in Maddox et al., arXiv:1902.02476.
_SWAG_RANK = 20


class Average(NamedTuple):
    """An average: a link of the optimizer, and how results name what is read of it."""

    name: str  # in settings, of the link and in results
    label: str  # in tables
    make: Make | None  # None: it is put together afterwards, from others
    samples: int = 0  # whose predictions are averaged. 0: it is one network
    width: float | None = None  # sigma_rel


def parse(name: str) -> Average:
    """The average that a setting names.

    EMA and power EMA take every step from the first; LAWA and SWAG the ends of epochs,
    LAWA all of them and SWAG those that SWA takes. A power EMA is also put together
    afterwards, from those of other widths at some ends of epochs.

    Raises:
        ValueError: It names none.
    """
    kind, _, text = name.partition(":")
    try:
        found = _KINDS[kind](name, text)
        if found.make is not None:
            found.make(1, 1)  # the library's own checks of the number
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"averages contains {name!r}; write each as {_FORMS}, such as ema:0.99"
            f" ({error})."
        ) from error
    return found


def check_averages(names: tuple[str, ...]) -> None:
    """Raise ValueError for what names no average, and for what stands twice."""
    found = [parse(name) for name in names]
    check(
        len({each.label for each in found}) == len(found),
        f"averages is {names}; each must appear once.",
    )
    kept = [each.width for each in found if each.width and each.make]
    for each in found:
        check(
            each.make is not None
            or (len(kept) > 1 and min(kept) <= (each.width or 0) <= max(kept)),
            f"averages contains {each.name!r} with power:SIGMA_REL of {kept}; a width"
            " is put together afterwards from two that are kept, below and above it,"
            " as in --averages power:0.05 power:0.2 posthoc:0.1.",
        )


def _ema(name: str, text: str) -> Average:
    decay = float(text)
    return Average(name, f"EMA {decay:g}", lambda first, steps: swa_jax.ema(decay))


def _power(name: str, text: str) -> Average:
    width = float(text)
    return Average(
        name,
        f"power EMA {width:g}",
        lambda first, steps: swa_jax.power_ema(width),
        width=width,
    )


def _posthoc(name: str, text: str) -> Average:
    kept = _power(name, text)
    swa_jax.power_ema(float(text))  # the library's own check of the width
    return kept._replace(label=f"{kept.label}, afterwards", make=None)


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
    "posthoc": _posthoc,
    "lawa": _lawa,
    "swag": _swag,
}
