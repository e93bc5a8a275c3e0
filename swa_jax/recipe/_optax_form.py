"""The method inside optax: a schedule, and a transformation."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from swa_jax._validate import check_count
from swa_jax.averages.swa import swa
from swa_jax.recipe._settings import Settings
from swa_jax.recipe._timing import Length
from swa_jax.schedules import as_schedule, as_step, scalar_arithmetic


def schedule(
    settings: Settings,
    base: optax.ScalarOrSchedule,
    num_epochs: int,
    steps_per_epoch: int,
) -> optax.Schedule:
    """See ``SWA.schedule``."""
    length = _known_length(num_epochs, steps_per_epoch)
    when, size = settings.window(length).when, settings.tick_size(length)
    base = as_schedule(base)

    @scalar_arithmetic()
    def schedule(step: Any) -> jax.Array:
        step = as_step(step)
        number = when.position(jnp.minimum(step // size, when.stop))
        lr0 = base(jnp.asarray(when.start * size - 1, step.dtype))
        annealed = settings.annealed(lr0, number, length)
        return jnp.where(number > 0, annealed, base(step))

    return schedule


def transform(
    settings: Settings, num_epochs: int, steps_per_epoch: int
) -> optax.GradientTransformationExtraArgs:
    """See ``SWA.transform``."""
    length = _known_length(num_epochs, steps_per_epoch)
    when, size = settings.window(length).when, settings.tick_size(length)
    return swa(
        when.start * size,
        when.period * size,
        stop_step=when.stop * size,
        skip_nonfinite=bool(settings.skip_nonfinite),
    )


def _known_length(num_epochs: Any, steps_per_epoch: Any) -> Length:
    check_count("steps_per_epoch", steps_per_epoch)  # None is not enough here
    length = Length.of(num_epochs, steps_per_epoch)
    length.updates()
    return length
