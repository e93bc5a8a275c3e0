"""``posthoc_ema()``: an average of any width, from stored ones of two."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from swa_jax._rules import gamma_of
from swa_jax._validate import check_number
from swa_jax.averages.ema import check_sigma
from swa_jax.averages.soups import soup
from swa_jax.typing import PyTree


class Snapshot(NamedTuple):
    """A ``power_ema`` as it was at some moment of training.

    Attributes:
      step: the models in it, ``PowerEMAState.num_averaged``.
      sigma_rel: the width that it was kept with.
      params: its weights, or a function without arguments that loads them.
    """

    step: float
    sigma_rel: float
    params: PyTree | Callable[[], PyTree]


def posthoc_ema(
    snapshots: Iterable[Snapshot | tuple[float, float, PyTree]],
    *,
    sigma_rel: float,
    step: float,
) -> PyTree:
    """Puts an average together that was never kept, from stored ones.

    A power average of many models has the profile ``(gamma + 1) * t**gamma /
    T**(gamma + 1)`` up to its step T. The result is that combination of the snapshots
    whose profile is nearest to the wanted one, in least squares: of the Gram matrix A
    of their profiles and their products b with the wanted one, ``A x = b`` is solved in
    float64, and x divided by its sum.

    Keep two ``power_ema``, such as of 0.05 and 0.10, and store both from time to time.
    Eight snapshots of each give 0.075 to 1.2e-2 of its profile, sixteen to 3.5e-3. A
    stored width at a stored step comes back as it is.

    Args:
      snapshots: ``Snapshot``s, or tuples of the same. Those later than ``step`` are
        left out. Weights that are functions are loaded one at a time.
      sigma_rel: the wanted width, see ``power_ema``.
      step: the moment of training that it is wanted for, in models averaged.

    Returns:
      A pytree like a snapshot's ``params``, in its dtypes.

    Raises:
      ValueError: no snapshot up to ``step``, two of the same step and width, all of one
        width that is not the wanted one, or a width or step out of range; see ``soup``
        for weights that differ.
      TypeError: a width or step is no number.

    Warns:
      UserWarning: the width lies outside the stored ones, or the latest snapshot before
        ``step``: such results are less accurate.

    Example:
      >>> import jax.numpy as jnp, swa_jax
      >>> widths = {s: swa_jax.power_ema(s) for s in (0.05, 0.1, 0.15)}
      >>> stored, states = [], {}
      >>> for s, average in widths.items():
      ...     states[s] = swa_jax.init_average(jnp.zeros(()), average)
      ...     for t in range(1, 801):
      ...         params = jnp.float32(t / 800) ** 2
      ...         states[s] = swa_jax.update_average(states[s], params, average)
      ...         if t % 100 == 0 and s != 0.1:
      ...             stored.append(swa_jax.Snapshot(t, s, +states[s].avg_params))
      >>> found = swa_jax.posthoc_ema(stored, sigma_rel=0.1, step=800)
      >>> print(abs(float(found - states[0.1].avg_params)) < 1e-3)
      True

    References:
      Karras et al., CVPR 2024, https://arxiv.org/abs/2312.02696, section 3 and
      appendix C.
    """
    stored = [Snapshot(*snapshot) for snapshot in snapshots]
    used, weights = posthoc_weights([each[:2] for each in stored], sigma_rel, step)
    return soup(_loaded([stored[i] for i in used]), weights)


def posthoc_weights(
    stored: Sequence[tuple[float, float]], sigma_rel: float, step: float
) -> tuple[list[int], np.ndarray]:
    """What each stored average counts for in the wanted one.

    Args:
      stored: the step and the width of each, see ``Snapshot``.
      sigma_rel: the wanted width.
      step: the step that it is wanted for.

    Returns:
      The places of those that are used, and their weights, float64 of the same length,
      not yet divided by their sum.

    Raises:
      ValueError, TypeError: see ``posthoc_ema``.
    """
    sigma = check_sigma("sigma_rel", sigma_rel)
    until = check_number("step", step, 0, math.inf, open_below=True)
    kinds = [_checked(i, *kind) for i, kind in enumerate(stored)]
    used = [i for i, (found, _) in enumerate(kinds) if found <= until]
    _check_enough([kinds[i] for i in used], len(kinds), sigma, until)
    weights = _solve(
        np.array([kinds[i][0] for i in used]),
        np.array([gamma_of(kinds[i][1]) for i in used]),
        until,
        gamma_of(sigma),
    )
    return used, weights


def _solve(
    steps: np.ndarray, gammas: np.ndarray, step: float, gamma: float
) -> np.ndarray:
    """The weights of the snapshots, not yet divided by their sum."""
    gram = _products(steps[:, None], gammas[:, None], steps, gammas)
    wanted = _products(steps, gammas, np.array(step), np.array(gamma))
    return np.linalg.solve(gram, wanted)


def _products(
    t: np.ndarray, gamma: np.ndarray, other_t: np.ndarray, other_gamma: np.ndarray
) -> np.ndarray:
    """Of two profiles, the integral of their product."""
    exponent = np.where(t < other_t, other_gamma, -gamma)
    scale = (gamma + 1) * (other_gamma + 1) * (t / other_t) ** exponent
    return scale / ((gamma + other_gamma + 1) * np.maximum(t, other_t))


def _checked(number: int, step: float, sigma_rel: float) -> tuple[float, float]:
    name = f"snapshots[{number}]"
    return (
        check_number(f"{name}.step", step, 0, math.inf, open_below=True),
        check_sigma(f"{name}.sigma_rel", sigma_rel),
    )


def _check_enough(
    kinds: list[tuple[float, float]], stored: int, sigma_rel: float, step: float
) -> None:
    if not kinds:
        raise ValueError(
            f"posthoc_ema: none of {stored} snapshots is of step={step:g} or before; "
            "steps are counted in models averaged, PowerEMAState.num_averaged"
        )
    twice = next((kind for kind in kinds if kinds.count(kind) > 1), None)
    if twice is not None:
        raise ValueError(
            f"posthoc_ema: two snapshots have step={twice[0]:g} and sigma_rel="
            f"{twice[1]:g}; pass each once"
        )
    widths = sorted({width for _, width in kinds})
    if len(widths) == 1 and (step, sigma_rel) not in kinds:
        raise ValueError(
            f"posthoc_ema: all snapshots have sigma_rel={widths[0]:g}, of which no "
            f"other width can be made, such as {sigma_rel:g}; store power_ema of two "
            "widths or more"
        )
    latest = max(found for found, _ in kinds)
    outside = not widths[0] <= sigma_rel <= widths[-1]
    if outside or latest < step:
        what = (
            f"sigma_rel={sigma_rel:g} lies outside the stored widths, {widths[0]:g} to "
            f"{widths[-1]:g}"
            if outside
            else f"the latest snapshot is of step {latest:g}, before step={step:g}"
        )
        warnings.warn(f"posthoc_ema: {what}: less accurate", stacklevel=4)


def _loaded(snapshots: list[Snapshot]) -> Iterator[PyTree]:
    for snapshot in snapshots:
        params = snapshot.params
        yield params() if callable(params) else params
