"""The same averages as timm, ema-pytorch, diffusers, PyTorch, optax, Keras and EDM2.

``tests/golden`` holds what those libraries computed, and the scripts that recorded it.
Each recorded run is set beside the call of ours that stands for it, and both beside
``running_mean``, a few lines of NumPy in float64. Where a peer counts, starts or rounds
otherwise, a test says so: what people who come from there have to know.

Updates count from 1: row 0 of a recorded array is after the first.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import swa_jax

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
U = 2.0**-24  # float32's unit roundoff: the relative error of one operation

Row = dict[str, Any]
Rate = Callable[[int], float]


def read_json(name: str) -> Row:
    """A recorded JSON file."""
    return json.loads((GOLDEN / name).read_text())


@functools.cache
def read_arrays(name: str) -> dict[str, np.ndarray]:
    """Every array of a recorded .npz file."""
    with np.load(GOLDEN / name) as file:
        return dict(file)


RUNS = read_json("averages.json")["runs"]
RECORDED = read_arrays("averages.npz")
INITIAL, MODELS = RECORDED["initial"], RECORDED["models"]
LARGEST = float(np.abs(MODELS).max())

# A step of a running average rounds a difference, a rate and a product, of up to twice
# the largest weight each, and a sum: below 8 U of it on either side, most of which
# later steps forget. Counting one model more or less costs a thousand times as much.
TOLERANCE = 2 * 8 * U * LARGEST * len(MODELS)  # 4e-5


def runs_of(*peers: str) -> Any:
    """Parametrises a test by the recorded runs of some peers."""
    chosen = [run for run in RUNS if run["peer"] in peers]
    assert {run["peer"] for run in chosen} == set(peers)
    ids = ["-".join(f"{v}" for v in run.values()) for run in chosen]
    return pytest.mark.parametrize("run", chosen, ids=ids)


# The oracle -------------------------------------------------------------------


def running_mean(
    models: np.ndarray, rate: Rate, start: int = 1, period: int = 1
) -> np.ndarray:
    """``mean += rate(n) * (q - mean)`` in float64, read after every update.

    The n-th model averaged is that of update ``start + (n - 1) * period``; the first
    replaces the mean, whatever its rate. Before it there is none: NaN.
    """
    mean = np.full(models.shape[1:], np.nan)
    means, n = [], 0
    for number, model in enumerate(models.astype(np.float64), 1):
        if number >= start and (number - start) % period == 0:
            n += 1
            mean = model if n == 1 else mean + rate(n) * (model - mean)
        means.append(mean)
    return np.stack(means)


def constant(decay: float) -> Rate:
    """The exponential average that starts from the first model as it is."""
    return lambda n: 1 - decay


def debiased(decay: float) -> Rate:
    """The exponential average that starts from zero, divided by what it holds."""
    return lambda n: (1 - decay) / (1 - decay**n)


def warmup(
    decay: float, inv_gamma: float = 1.0, power: float = 2 / 3, min_decay: float = 0.0
) -> Rate:
    """One minus the decay that grows with the number of models."""

    def rate(n: int) -> float:
        return 1 - max(min(1 - (1 + (n - 1) / inv_gamma) ** -power, decay), min_decay)

    return rate


# Ours -------------------------------------------------------------------------


def tree(row: Any) -> Any:
    """A recorded row as the parameters that it was, any leading axes kept."""
    lead = row.shape[:-1]
    return {"w": row[..., :6].reshape(*lead, 3, 2), "b": row[..., 6:]}


def flat(params: Any) -> np.ndarray:
    """Such parameters as a row again."""
    w = np.asarray(params["w"])
    return np.concatenate([w.reshape(*w.shape[:-2], 6), np.asarray(params["b"])], -1)


def in_training(
    average: optax.GradientTransformation, models: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Feeds models to an average as an optimizer does, one an update.

    They arrive as updates of zeros, so that what is averaged has their very bits.
    Returns the average and the number of averaged models after each.
    """
    weights = tree(jnp.asarray(models))
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x[0]), weights)

    def step(state: Any, updates: Any) -> Any:
        _, state = average.update(updates, state, zeros)
        return state, (state.avg_params, state.num_averaged)

    _, (means, counts) = jax.lax.scan(step, average.init(zeros), weights)
    return flat(means), np.asarray(counts)


def in_a_loop(average: Any, models: np.ndarray) -> np.ndarray:
    """Feeds models to an average from a loop; what it holds after each."""
    state = swa_jax.init_average(tree(jnp.asarray(models[0])), average)
    means = []
    for model in models:
        state = swa_jax.update_average(state, tree(jnp.asarray(model)), average)
        means.append(flat(state.avg_params))
    return np.stack(means)


# Peers: the call of ours that stands for each ---------------------------------


@dataclasses.dataclass(frozen=True)
class Twin:
    """What stands for a recorded run: a call of ours, and the oracle's rate."""

    average: Callable[..., Any]  # takes start_step and period
    rate: Rate
    start: int = 1
    period: int = 1
    from_initial: bool = False  # the initial weights are the first model


def constant_twin(decay: float, **settings: Any) -> Twin:
    """``ema(decay, debias=False)``."""
    ema = functools.partial(swa_jax.ema, decay, debias=False)
    return Twin(ema, constant(decay), **settings)


def warmup_twin(decay: float, options: Row, **settings: Any) -> Twin:
    """``ema(ema_warmup(decay, ...))``."""
    ema = functools.partial(swa_jax.ema, swa_jax.ema_warmup(decay, **options))
    return Twin(ema, warmup(decay, **options), **settings)


def renamed(run: Row, **names: str) -> Row:
    """The settings that a run has, under our names."""
    return {ours: run[theirs] for theirs, ours in names.items() if theirs in run}


def timm_twin(run: Row) -> Twin:
    """``update(model, step)`` copies up to step ``update_after_step + 1``.

    timm's script tells it the number of the update, from 1: no off-by-one is left.
    Steps that count from 0 are one late. Without a step there is no warm-up, and no
    copy: the initial weights, that it was made from, are the first model.
    """
    if run["first_step"] is None:
        return constant_twin(run["decay"], from_initial=True)
    start = run.get("update_after_step", 0) + 2 - run["first_step"]
    if not run.get("use_warmup"):
        return constant_twin(run["decay"], start=start)
    names = {"warmup_gamma": "inv_gamma", "warmup_power": "power"}
    options = renamed(run, **names, min_decay="min_decay")
    return warmup_twin(run["decay"], options, start=start)


def ema_pytorch_twin(run: Row) -> Twin:
    """It updates at the calls 1, 1 + every, ..., and counts calls, not models.

    So its ``inv_gamma`` is ``every`` times ours. The last model that it copies is the
    first of ours; where ``update_after_step`` is no multiple of ``every`` the count
    begins in between two models, which takes a decay of one's own.
    """
    every, after = run["update_every"], run["update_after_step"]
    late = after % every
    where = {"start": after - late + 1, "period": every}
    options = renamed(run, inv_gamma="inv_gamma", power="power", min_value="min_decay")
    if not late:
        options["inv_gamma"] = options.get("inv_gamma", 1.0) / every
        return warmup_twin(run["beta"], options, **where)
    assert not options

    def decay(n: Any) -> Any:
        calls = jnp.maximum((n - 1) * every - late, 0)
        return jnp.minimum(1 - (1.0 + calls) ** (-2 / 3), run["beta"])

    rate: Rate = lambda n: max((1 + (n - 1) * every - late) ** (-2 / 3), 1e-4)  # noqa: E731
    return Twin(functools.partial(swa_jax.ema, decay), rate, **where)


def diffusers_twin(run: Row) -> Twin:
    """It counts calls from 1, as ours counts updates; its default is TensorFlow's."""
    start = run.get("update_after_step", 0) + 1
    if run.get("use_ema_warmup"):
        names = dict.fromkeys(("inv_gamma", "power", "min_decay"))
        options = renamed(run, **{name: name for name in names})
        return warmup_twin(run["decay"], options, start=start)
    average = functools.partial(
        swa_jax.ema, lambda n: jnp.minimum(run["decay"], n / (9 + n))
    )
    return Twin(average, lambda n: 1 - min(run["decay"], n / (9 + n)), start=start)


def karras_twin(run: Row) -> Twin:
    """Its n-th model has the rate of a later one: it starts with step 1, then adds 1.

    And it counts calls, of which only every ``update_every``-th updates.
    """
    every = run["update_every"]
    gamma = run["gamma"] if "gamma" in run else gamma_of(run["sigma_rel"])

    def kept(n: Any) -> Any:
        return (1 - 1 / ((n - 1) * every + 2)) ** (gamma + 1)

    return Twin(
        functools.partial(swa_jax.ema, kept), lambda n: 1 - kept(n), period=every
    )


def gamma_of(sigma_rel: float) -> float:
    """The exponent of a width, by bisection: the width falls as the exponent grows."""
    low, high = 0.0, 1e4
    for _ in range(100):
        gamma = (low + high) / 2
        width = np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))
        low, high = (gamma, high) if width > sigma_rel else (low, gamma)
    return low


TWINS: dict[str, Callable[[Row], Twin]] = {
    "timm": timm_twin,
    "ema_pytorch": ema_pytorch_twin,
    "diffusers": diffusers_twin,
    "karras": karras_twin,
    "pytorch": lambda run: constant_twin(run["decay"]),
    "keras": lambda run: constant_twin(
        run["decay"], start=run["gradient_accumulation_steps"] or 1
    ),
}


@runs_of(*TWINS)
def test_ours_is_the_recorded_average(run: Row) -> None:
    """After every update from the first averaged model on."""
    recorded, twin = RECORDED[run["run"]], TWINS[run["peer"]](run)
    models = RECORDED.get(f"{run['run']}/models", MODELS)
    if twin.from_initial:
        models = np.concatenate([INITIAL[None], models])
        expected = running_mean(models, twin.rate)
        ours = in_a_loop(twin.average(), models)
        ours, expected = ours[1:], expected[1:]
        averaged = np.full(len(recorded), True)
    else:
        expected = running_mean(models, twin.rate, twin.start, twin.period)
        average = twin.average(start_step=twin.start, period=twin.period)
        ours, counts = in_training(average, models)
        averaged = counts > 0
        np.testing.assert_array_equal(averaged, ~np.isnan(expected[:, 0]))
    # Our rates are as exact as the sum; only ema-pytorch takes its decay in float32.
    np.testing.assert_allclose(
        recorded[averaged], expected[averaged], rtol=0, atol=TOLERANCE
    )
    np.testing.assert_allclose(
        ours[averaged], recorded[averaged], rtol=0, atol=TOLERANCE
    )


@runs_of("timm", "ema_pytorch", "diffusers", "karras", "pytorch", "keras")
def test_before_the_first_model_peers_hold_a_copy(run: Row) -> None:
    """Of the latest model, or of the latest that they looked at: no average yet.

    Ours reads as the current weights then, which is the same where every update is
    looked at. diffusers takes the difference away, which rounds twice.
    """
    recorded, twin = RECORDED[run["run"]], TWINS[run["peer"]](run)
    models = RECORDED.get(f"{run['run']}/models", MODELS)
    for i in range(0 if twin.from_initial else twin.start):
        copied = models[i - i % twin.period]
        atol = 4 * U * LARGEST if run["peer"] == "diffusers" else 0
        np.testing.assert_allclose(recorded[i], copied, rtol=0, atol=atol)


def test_timm_takes_no_warmup_without_a_step() -> None:
    """The two runs are one: the first model enters by 1 - decay, it copies none."""
    plain, asked = (
        RECORDED[run["run"]]
        for run in RUNS
        if run["peer"] == "timm" and run["first_step"] is None
    )
    np.testing.assert_array_equal(asked, plain)
    np.testing.assert_allclose(
        plain[0],
        0.9 * INITIAL.astype(np.float64) + 0.1 * MODELS[0],
        rtol=0,
        atol=8 * U * LARGEST,  # one step
    )


# optax ------------------------------------------------------------------------


@runs_of("optax")
def test_debiased_is_optax_ema_with_more_digits(run: Row) -> None:
    """``optax.ema`` over weights; its 1 - decay**n, in float32, loses what ours keeps.

    A float32 decay below 1 is off by U/2, and by as much for every power: 1 - decay**n
    by up to n U, of about n (1 - decay).
    """
    decay, recorded = run["decay"], RECORDED[run["run"]]
    expected = running_mean(MODELS, debiased(decay))
    in_bias = U / (1 - decay) * LARGEST * 2  # 2: decay**15 and up stays above 1/2 of 1
    np.testing.assert_allclose(recorded, expected, rtol=0, atol=TOLERANCE + in_bias)
    ours, _ = in_training(swa_jax.ema(decay), MODELS)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)
    if decay == 0.9999:  # where the deliberate difference is plain to see
        assert np.abs(recorded - expected).max() > 10 * TOLERANCE
        np.testing.assert_allclose(recorded[0], MODELS[0] * (1 - 1.66e-4), rtol=1e-6)


# Keras ------------------------------------------------------------------------


def keras_run(accumulation: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Its average before the first update, its models and its averages after each."""
    (name,) = (
        run["run"]
        for run in RUNS
        if run["peer"] == "keras" and run["gradient_accumulation_steps"] == accumulation
    )
    return RECORDED[f"{name}/before"][0], RECORDED[f"{name}/models"], RECORDED[name]


@pytest.mark.parametrize("accumulation", [None, 2])
def test_keras_starts_from_zeros_that_it_never_uses(accumulation: int | None) -> None:
    """The weights at update 1, be they moved yet or not, replace the zeros."""
    before, models, averages = keras_run(accumulation)
    np.testing.assert_array_equal(before, 0)
    np.testing.assert_array_equal(averages[0], models[0])


def test_keras_moves_on_micro_batches_where_ours_moves_once() -> None:
    """Two micro-batches, two moves; inside ``optax.MultiSteps`` ours makes one."""
    decay, every = 0.9, 2
    _, models, theirs = keras_run(every)
    # The weights stand still on the first micro-batch of each pair, the average moves.
    np.testing.assert_array_equal(models[2::2], models[1:-1:2])
    assert np.abs(theirs[2::2] - theirs[1:-1:2]).max() > 100 * TOLERANCE
    expected = running_mean(models[1::2], constant(decay))
    tx = optax.MultiSteps(
        optax.chain(optax.sgd(1.0), swa_jax.ema(decay, debias=False)), every
    )

    def step(carry: Any, target: Any) -> Any:
        params, state = carry
        grads = jax.tree.map(jnp.subtract, params, target)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        average = swa_jax.averaged_params(state, params, allow_empty=True)
        return (params, state), average

    start = tree(jnp.asarray(INITIAL))
    targets = tree(jnp.asarray(np.repeat(models[1::2], every, axis=0)))
    _, ours = jax.lax.scan(step, (start, tx.init(start)), targets)
    # Targets are reached within the rounding of a difference: 2 U of the largest.
    np.testing.assert_allclose(
        flat(ours)[1::2], expected, rtol=0, atol=TOLERANCE + 4 * U * LARGEST
    )
    assert np.abs(theirs[1::2] - expected).max() > 100 * TOLERANCE


# EDM2 -------------------------------------------------------------------------

EDM2 = read_json("edm2.json")
WIDTHS = ("0.05", "0.1")


def snapshots(step: list[int], sigma_rel: list[float], rows: np.ndarray) -> list[Any]:
    """Stored averages, one a row."""
    return [
        swa_jax.Snapshot(at, width, {"w": jnp.asarray(row)})
        for at, width, row in zip(step, sigma_rel, rows, strict=True)
    ]


@pytest.mark.parametrize("width", WIDTHS)
def test_power_ema_is_edm2s(width: str) -> None:
    """It counts images; with batches of one size that is the number of the update."""
    recorded, gamma = read_arrays("edm2.npz")[width], gamma_of(float(width))
    expected = running_mean(MODELS, lambda n: 1 - (1 - 1 / n) ** (gamma + 1))
    np.testing.assert_allclose(recorded, expected, rtol=0, atol=TOLERANCE)
    for average in (swa_jax.power_ema(float(width)), swa_jax.power_ema(gamma=gamma)):
        ours, _ = in_training(average, MODELS)
        np.testing.assert_allclose(ours, recorded, rtol=0, atol=TOLERANCE)


def test_exponents_are_edm2s() -> None:
    """The root of a cubic there, bisection here: float64 on both sides."""
    ours = [gamma_of(sigma_rel) for sigma_rel in EDM2["sigma_rel"]]
    np.testing.assert_allclose(ours, EDM2["gamma"], rtol=1e-11)


EDM2_CASES = [
    pytest.param(case, id=f"{len(case['step'])}-at-{case['wanted_step']}")
    for case in EDM2["cases"]
    if len(set(case["sigma_rel"])) > 1  # one width alone is no basis
]


@pytest.mark.parametrize("case", EDM2_CASES)
def test_posthoc_coefficients_are_edm2s(case: Row) -> None:
    """Read off from snapshots that are 1 in one place each.

    The systems have condition numbers below 6,000 (asserted by the oracle's agreement
    to 1e-10), so float64 leaves an error far below float32's rounding of the result,
    which is all that is allowed here: one product and sums of zeros.
    """
    step, sigma_rel = case["step"], case["sigma_rel"]
    for sigma, expected in zip(
        case["wanted_sigma_rel"], case["coefficients"], strict=True
    ):
        np.testing.assert_allclose(
            posthoc_coefficients(step, sigma_rel, case["wanted_step"], sigma),
            expected,
            rtol=0,
            atol=1e-10,
        )
        rows = np.eye(len(step), dtype=np.float32)
        made = swa_jax.posthoc_ema(
            snapshots(step, sigma_rel, rows), sigma_rel=sigma, step=case["wanted_step"]
        )
        np.testing.assert_allclose(made["w"], expected, rtol=4 * U, atol=1e-10)


def posthoc_coefficients(
    step: list[int], sigma_rel: list[float], wanted_step: int, wanted: float
) -> np.ndarray:
    """Least squares between profiles, by quadrature instead of the closed form.

    On pieces between the snapshots' steps the products of profiles are smooth.
    """
    t, g = np.array(step, np.float64), np.array([gamma_of(s) for s in sigma_rel])
    edges = np.unique([0.0, *t, wanted_step])
    x, w = np.polynomial.legendre.leggauss(40)
    half, middle = np.diff(edges) / 2, (edges[1:] + edges[:-1]) / 2
    nodes = (half[:, None] * x + middle[:, None]).ravel()
    weights = (half[:, None] * w).ravel()

    def profile(at: float, gamma: float) -> np.ndarray:
        return np.where(nodes < at, (gamma + 1) / at * (nodes / at) ** gamma, 0)

    basis = np.stack([profile(*pair) for pair in zip(t, g, strict=True)])
    target = profile(wanted_step, gamma_of(wanted))
    found = np.linalg.solve((basis * weights) @ basis.T, (basis * weights) @ target)
    return found / found.sum()


def test_posthoc_leaves_out_later_snapshots_as_edm2s_script_does() -> None:
    """Those of a run that went on past the wanted step."""
    at_16, at_12 = EDM2["cases"][:2]
    rows = np.eye(len(at_16["step"]), dtype=np.float32)
    used = [step <= 12 for step in at_16["step"]]
    for sigma, expected in zip(
        at_12["wanted_sigma_rel"], at_12["coefficients"], strict=True
    ):
        made = swa_jax.posthoc_ema(
            snapshots(at_16["step"], at_16["sigma_rel"], rows), sigma_rel=sigma, step=12
        )
        found = np.asarray(made["w"])
        np.testing.assert_allclose(found[used], expected, rtol=4 * U, atol=1e-10)
        np.testing.assert_array_equal(found[np.logical_not(used)], 0)


def test_posthoc_of_edm2s_own_averages() -> None:
    """Recorded averages, put together by recorded coefficients."""
    case = EDM2["cases"][0]
    recorded = read_arrays("edm2.npz")
    rows = np.stack(
        [
            recorded[str(sigma)][step - 1]
            for step, sigma in zip(case["step"], case["sigma_rel"], strict=True)
        ]
    )
    stored = snapshots(case["step"], case["sigma_rel"], rows)
    for sigma, coefficients in zip(
        case["wanted_sigma_rel"], case["coefficients"], strict=True
    ):
        made = swa_jax.posthoc_ema(stored, sigma_rel=sigma, step=case["wanted_step"])
        expected = np.array(coefficients) @ rows.astype(np.float64)
        # A product and a sum for each of 8 snapshots, coefficients below 1 in size.
        atol = 2 * len(rows) * U * LARGEST
        np.testing.assert_allclose(made["w"], expected, rtol=0, atol=atol)
        if str(sigma) in WIDTHS:  # a stored width comes back
            last = recorded[str(sigma)][-1]
            np.testing.assert_allclose(made["w"], last, rtol=0, atol=atol)


# ema-pytorch's KarrasEMA and PostHocEMA ---------------------------------------


def test_karras_is_not_the_power_average() -> None:
    """One step late with ``update_every=1``, and by far too slow above."""
    for run in (run for run in RUNS if run["peer"] == "karras"):
        gamma = run["gamma"] if "gamma" in run else gamma_of(run["sigma_rel"])

        def rate(n: int, gamma: float = gamma) -> float:
            return 1 - (1 - 1 / n) ** (gamma + 1)

        power = running_mean(MODELS, rate, period=run["update_every"])
        assert np.abs(RECORDED[run["run"]] - power).max() > 100 * TOLERANCE


@runs_of("karras_first_model")
def test_karras_keeps_its_first_model(run: Row) -> None:
    """With its default, an update every 100 calls, for ever: 40 and 66 % after 10,000.

    The power average of as many models keeps n ** -(gamma + 1) of it.
    """
    every, gamma = run["update_every"], gamma_of(run["sigma_rel"])
    n = np.arange(2, run["num_steps"] // every + 1, dtype=np.float64)
    share = np.prod((1 - 1 / ((n - 1) * every + 2)) ** (gamma + 1))
    # One rounding of a product and one of a rate an update, on float32 weights; below
    # float32's smallest normal number nothing is left to compare.
    np.testing.assert_allclose(run["share"], share, rtol=4 * U * len(n), atol=1e-37)
    assert (share > 0.39) == (every == 100)
    assert (len(n) + 1) ** -(gamma + 1) < 1e-15


def test_karras_posthoc_forgets_to_divide() -> None:
    """Its coefficients, divided by their sum, are EDM2's and ours; they are not.

    For a width in between, four snapshots of each give 1.011 times the weights.
    """
    (run,) = (run for run in RUNS if run["peer"] == "karras_posthoc")
    rows = RECORDED[f"{run['run']}/snapshots"]
    stored = snapshots(run["step"], run["sigma_rel"], rows)
    sums = []
    for i, sigma in enumerate(run["wanted_sigma_rel"]):
        coefficients = np.array(run["coefficients"][i])
        sums.append(coefficients.sum())
        # Its exponents are float32: U relative each, times a condition number of 120.
        case = EDM2["cases"][0]
        theirs = case["coefficients"][case["wanted_sigma_rel"].index(sigma)]
        np.testing.assert_allclose(coefficients / sums[i], theirs, rtol=0, atol=120 * U)
        result = RECORDED[f"{run['run']}/results"][i]
        atol = (2 * len(rows) + 120) * U * LARGEST
        np.testing.assert_allclose(
            result, coefficients @ rows.astype(np.float64), rtol=0, atol=atol
        )
        made = swa_jax.posthoc_ema(stored, sigma_rel=sigma, step=run["wanted_step"])
        np.testing.assert_allclose(made["w"], result / sums[i], rtol=0, atol=atol)
    np.testing.assert_allclose(sums, [1, 1.01087], rtol=0, atol=1e-5)


# SWAG -------------------------------------------------------------------------

SWAG = read_arrays("swag.npz")
RANK = int(SWAG["max_num_models"])
NUM_DRAWS = int(SWAG["num_draws"])


def of_swag(name: str) -> dict[str, np.ndarray]:
    """What was recorded of one collection of models."""
    return {
        key.removeprefix(f"{name}/"): value
        for key, value in SWAG.items()
        if key.startswith(f"{name}/")
    }


@functools.cache
def collected(name: str, rank: int = RANK) -> Any:
    """Our SWAG of the same models; a weight (2, 1) and a bias (2,) as there."""
    average = swa_jax.swag(rank)
    models = jnp.asarray(of_swag(name)["models"])
    weights = {"w": models[:, :2, None], "b": models[:, 2:]}
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x[0]), weights)

    def step(state: Any, updates: Any) -> Any:
        return average.update(updates, state, zeros)[1], None

    return jax.lax.scan(step, average.init(zeros), weights)[0], zeros


def side_by_side(leaves: Any) -> np.ndarray:
    """Both leaves as one vector, or one row each along a leading axis."""
    w = np.asarray(leaves["w"], np.float64)[..., 0]
    return np.concatenate([w, np.asarray(leaves["b"], np.float64)], -1)


@pytest.mark.parametrize("name", ["many", "few"])
def test_swag_collects_what_its_authors_do(name: str) -> None:
    """Mean, variance and deviations from the mean as updated.

    Theirs is the mean of squares minus the square of the mean, which loses digits
    where the mean is larger than the spread; here it is about as large.
    """
    theirs, (ours, _) = of_swag(name), collected(name)
    n = len(theirs["models"])
    assert int(ours.num_averaged) == n
    size = float(np.abs(theirs["models"]).max())
    exact = theirs["models"].astype(np.float64)
    # The k-th step rounds the mean three times, of which k / n is left; either side.
    atol = 2 * 2 * U * n * size
    ours_mean = side_by_side(ours.avg_params)
    np.testing.assert_allclose(theirs["mean"], exact.mean(0), rtol=0, atol=atol)
    np.testing.assert_allclose(ours_mean, theirs["mean"], rtol=0, atol=atol)
    variance = theirs["sq_mean"] - theirs["mean"].astype(np.float64) ** 2
    np.testing.assert_allclose(
        side_by_side(ours.sq_deviations) / n, variance, rtol=0, atol=3 * size * atol
    )
    # In any order, that is the ring's affair; rows that no model took are zero.
    rows = np.zeros((RANK, 4))
    rows[: len(theirs["deviations"])] = theirs["deviations"]
    found, expected = (
        x[np.argsort(x[:, 0])] for x in (side_by_side(ours.deviations), rows)
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def test_swag_keeps_variances_that_its_authors_lose() -> None:
    """A mean of 300, a spread of .01: their float32 variance is noise, or below 0."""
    theirs, (ours, _) = of_swag("far"), collected("far")
    exact = theirs["models"].astype(np.float64).var(0)
    lost = theirs["sq_mean"] - theirs["mean"] ** 2
    assert lost.min() < 0
    assert (np.abs(lost - exact) > 0.99 * exact).all()
    n = len(theirs["models"])
    # Half of n roundings of the mean, U 300 each, are left in a deviation at the most:
    # 4e-4, in the square twice that share of the smallest spread, .006.
    np.testing.assert_allclose(side_by_side(ours.sq_deviations) / n, exact, rtol=0.15)


def moments(draws: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of draws."""
    rows = side_by_side(draws)
    return rows.mean(0), np.cov(rows.T)


def assert_moments(
    found: tuple[np.ndarray, np.ndarray], mean: np.ndarray, cov: np.ndarray
) -> None:
    """Within five standard errors of NUM_DRAWS draws of that Gaussian.

    A covariance of such draws has the variance (S_ii S_jj + S_ij**2) / N. The draws
    have fixed seeds; five errors in any of 14 figures would come once in 10^5 seeds.
    """
    scale = np.diag(cov)
    sem = np.sqrt(scale / NUM_DRAWS)
    assert (np.abs(found[0] - mean) <= 5 * sem).all()
    error = np.sqrt((np.outer(scale, scale) + cov**2) / NUM_DRAWS)
    assert (np.abs(found[1] - cov) <= 5 * error).all()


def their_cov(name: str, scale: float, columns: int) -> np.ndarray:
    """The covariance by what they collected: diagonal and low rank, at full size."""
    theirs = {k: v.astype(np.float64) for k, v in of_swag(name).items()}
    diagonal = np.diag(theirs["sq_mean"] - theirs["mean"] ** 2)
    rows = theirs["deviations"]
    return scale * (diagonal + rows.T @ rows / (columns - 1))


def sampled(name: str, scale: float, rank: int = RANK) -> tuple[np.ndarray, np.ndarray]:
    """The moments of our draws."""
    state, params = collected(name, rank)
    draw = functools.partial(swa_jax.swag_sample, scale=scale)
    keys = jax.random.split(jax.random.key(0), NUM_DRAWS)
    return moments(jax.vmap(draw, in_axes=(0, None, None))(keys, state, params))


@pytest.mark.parametrize(("name", "theirs"), [("scale1", 1.0), ("scale05", 0.5)])
def test_swags_scale_is_twice_its_authors(name: str, theirs: float) -> None:
    """Their default, 1, draws twice the paper's covariance; their experiments use 0.5.

    Ours is 1 for the paper's: (diagonal + low rank) / 2.
    """
    recorded = of_swag("many")
    cov = their_cov("many", theirs, columns=RANK)
    found = recorded[f"{name}/mean"], recorded[f"{name}/cov"]
    assert_moments(found, recorded["mean"], cov)
    assert_moments(sampled("many", 2 * theirs), recorded["mean"], cov)


def test_swag_diagonal_is_theirs_at_scale_1() -> None:
    """Without columns nothing is halved, in the paper, there and here."""
    recorded = of_swag("many")
    cov = np.diag(recorded["sq_mean"].astype(np.float64) - recorded["mean"] ** 2)
    found = recorded["diagonal/mean"], recorded["diagonal/cov"]
    assert_moments(found, recorded["mean"], cov)
    assert_moments(sampled("many", 1.0, rank=0), recorded["mean"], cov)


def test_swag_by_blocks_squares_the_scale() -> None:
    """Their ``block=True`` takes it for a deviation, and draws tensors apart.

    One set of numbers for the whole model is ours, and their default.
    """
    recorded = of_swag("many")
    cov = their_cov("many", 0.5**2, RANK)
    cov[:2, 2:] = cov[2:, :2] = 0
    assert_moments(
        (recorded["block/mean"], recorded["block/cov"]), recorded["mean"], cov
    )
    whole = their_cov("many", 0.5, RANK)
    assert np.abs(whole[:2, 2:]).max() > 0.1  # what is lost


def test_swag_of_few_models_divides_by_the_columns_it_has() -> None:
    """Five models in a rank of 20: they divide by 19, ours by 4."""
    recorded = of_swag("few")
    found = recorded["scale1/mean"], recorded["scale1/cov"]
    assert_moments(found, recorded["mean"], their_cov("few", 1.0, columns=RANK))
    ours = sampled("few", 2.0)
    assert_moments(ours, recorded["mean"], their_cov("few", 1.0, columns=5))
    with pytest.raises(AssertionError):
        assert_moments(ours, recorded["mean"], their_cov("few", 1.0, columns=RANK))
