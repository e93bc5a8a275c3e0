"""The same numbers as PyTorch, torchcontrib and the original repository.

``tests/golden`` holds what those implementations computed, and the scripts that
recorded it; none of them is needed here. Steps count optimizer updates from 1 where
weights are averaged, and from 0 where a learning rate is asked for; recorded epochs
count from 0. S is the number of steps in an epoch.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, Literal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import swa_jax

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
U = 2.0**-24  # float32's unit roundoff: the relative error of one operation

Tree = dict[str, np.ndarray]


def read_json(name: str) -> dict[str, Any]:
    """A recorded JSON file."""
    return json.loads((GOLDEN / name).read_text())


@functools.cache
def read_arrays(name: str) -> Tree:
    """Every array of a recorded .npz file."""
    with np.load(GOLDEN / name) as file:
        return dict(file)


def subtree(arrays: Tree, prefix: str) -> Tree:
    """The arrays under a prefix, named without it."""
    prefix += "/"
    return {
        k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)
    }


def snapshot(stacked: Tree, index: Any) -> Tree:
    """Elements of arrays that are stacked along their first axis."""
    return {name: value[index] for name, value in stacked.items()}


def largest(tree: Tree) -> float:
    """The largest magnitude in a tree."""
    return max(float(np.abs(leaf).max()) for leaf in tree.values())


def averages(tx: optax.GradientTransformation, stacked: Tree) -> tuple[Any, np.ndarray]:
    """Feeds weights to a transformation, one set a step.

    The weights arrive as updates of zeros, so what is averaged has their very bits.
    Returns the mean and the number of averaged models after each step.
    """
    zeros = jax.tree.map(jnp.zeros_like, snapshot(stacked, 0))

    def step(state: Any, weights: Any) -> tuple[Any, Any]:
        _, state = tx.update(weights, state, zeros)
        return state, (swa_jax.swa_params(state, zeros), state.num_averaged)

    _, (means, counts) = jax.lax.scan(step, tx.init(zeros), stacked)
    return jax.device_get(means), np.asarray(counts)


def per_epoch(schedule: optax.Schedule, num_epochs: int, steps: int) -> np.ndarray:
    """The rates of all steps, one row an epoch."""
    num_steps = num_epochs * steps
    # Always 60 steps, so that the same compiled operations serve every test.
    rates = jax.vmap(schedule)(jnp.arange(max(60, num_steps)))
    return np.asarray(rates)[:num_steps].reshape(num_epochs, steps)


# PyTorch: SWALR ---------------------------------------------------------------

SWALR = read_json("pytorch_swalr.json")


def swalr_runs(*, loop: str = "documented", jump: bool = False) -> list[Any]:
    """The runs of one loop, those with anneal_epochs=0 or all the others."""
    return [
        pytest.param(
            run,
            id="{main}-{swa_start}-{strategy}-{anneal_epochs}".format_map(run),
        )
        for run in SWALR["runs"]
        if run["loop"] == loop and (run["anneal_epochs"] == 0) == jump
    ]


def main_phase(run: dict[str, Any], initial_lr: float, steps: int) -> optax.Schedule:
    """What PyTorch's main scheduler does, stepped at every end of an epoch."""
    if run["main"] == "constant":
        return optax.constant_schedule(initial_lr)
    if run["main"] == "multiplicative":
        factor = SWALR["multiplicative_factor"]
        return optax.exponential_decay(initial_lr, steps, factor, staircase=True)
    cosine = optax.cosine_decay_schedule(initial_lr, SWALR["cosine_t_max"])
    return lambda step: cosine(step // steps)


def our_swalr(run: dict[str, Any], group: int, steps: int) -> np.ndarray:
    """swa_schedule for one parameter group of a recorded run, one row an epoch.

    The documented loop still steps the main scheduler at the end of epoch
    ``swa_start``: the anneal begins with the epoch after it.
    """
    schedule = swa_jax.swa_schedule(
        main_phase(run, SWALR["initial_lrs"][group], steps),
        SWALR["swa_lrs"][group],
        start_step=(run["swa_start"] + 1) * steps,
        anneal_steps=run["anneal_epochs"] * steps,
        strategy=run["strategy"],
        update_every=steps,
    )
    return per_epoch(schedule, SWALR["num_epochs"], steps)


# PyTorch computes in float64, this package in float32. The argument of the cosine
# carries two roundings and its value one; blending, the two rates and the base
# schedule (a power or another cosine) add about eight: together below 16 U of the
# larger rate. An anneal that is off by one epoch is off by over 10,000 U.
LR_TOLERANCE = 16 * U


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("run", swalr_runs())
def test_swa_schedule_is_swalr(run: dict[str, Any], steps: int) -> None:
    """Each group's rate in each epoch, whatever the number of steps in it."""
    for group, rates in enumerate(run["learning_rates"]):
        ours = our_swalr(run, group, steps)
        expected = np.repeat(np.array(rates)[:, None], steps, axis=1)
        np.testing.assert_allclose(
            ours, expected, rtol=0, atol=LR_TOLERANCE * max(rates)
        )


@pytest.mark.parametrize("run", swalr_runs(jump=True))
def test_anneal_epochs_zero_differs_from_swalr(run: dict[str, Any]) -> None:
    """The deliberate difference: nothing happens before SWA begins.

    PyTorch's SWALR(anneal_epochs=0) sets the rate to swa_lr when it is constructed,
    and the main scheduler goes on from there. Here the main phase is untouched, and
    the rate jumps in the epoch where PyTorch's anneal starts.
    """
    start = run["swa_start"] + 1
    for group, recorded in enumerate(run["learning_rates"]):
        rates = np.array(recorded)
        initial_lr, swa_lr = SWALR["initial_lrs"][group], SWALR["swa_lrs"][group]
        tolerance = LR_TOLERANCE * max(initial_lr, swa_lr)
        base = per_epoch(main_phase(run, initial_lr, 1), len(rates), 1)[:, 0]

        rescaled = base * (swa_lr / initial_lr)
        np.testing.assert_allclose(
            rates[: start + 1], rescaled[: start + 1], rtol=0, atol=tolerance
        )
        np.testing.assert_array_equal(rates[start + 1 :], swa_lr)

        ours = our_swalr(run, group, steps=1)[:, 0]
        np.testing.assert_array_equal(ours[:start], base[:start])
        np.testing.assert_array_equal(ours[start:], np.float32(swa_lr))


@pytest.mark.parametrize("run", swalr_runs(loop="both"))
def test_main_schedule_does_not_reach_into_the_anneal(run: dict[str, Any]) -> None:
    """SWALR works on the current rate, so a main scheduler that steps on bends it.

    Ours is the closed form and stays with the run of the documented loop.
    """
    (documented,) = (
        other
        for other in SWALR["runs"]
        if other == {**run, **{k: other[k] for k in ("loop", "learning_rates")}}
        and other["loop"] == "documented"
    )
    for group, bent in enumerate(run["learning_rates"]):
        expected = np.array(documented["learning_rates"][group])
        ours = our_swalr(run, group, steps=1)[:, 0]
        np.testing.assert_allclose(
            ours, expected, rtol=0, atol=LR_TOLERANCE * max(expected)
        )
        assert np.abs(np.array(bent) / ours - 1).max() > 0.1


REJECTIONS = [
    pytest.param(row, id=f"{name}={row['arguments'][name]!r}")
    for row in read_json("pytorch_rejections.json")["runs"]
    for name in ("anneal_strategy", "anneal_epochs")
    if name in row["arguments"]
]


@pytest.mark.parametrize("row", REJECTIONS)
def test_swa_schedule_accepts_and_refuses_what_swalr_does(row: dict[str, Any]) -> None:
    """Where PyTorch raises, so do we, naming our argument and what came."""
    names = {"anneal_strategy": "strategy", "anneal_epochs": "anneal_steps"}
    (theirs,) = names.keys() & row["arguments"].keys()
    name, value = names[theirs], row["arguments"][theirs]
    arguments: dict[str, Any] = {"anneal_steps": 10, name: value}

    def build() -> optax.Schedule:
        return swa_jax.swa_schedule(0.1, 0.05, 5, **arguments)

    if row["error"] is None:
        assert np.isfinite(build()(7))
        return
    assert row["error"] == "ValueError"
    # PyTorch calls a length of the wrong type a ValueError too.
    wrong_type = theirs == "anneal_epochs" and not isinstance(value, int)
    with pytest.raises(TypeError if wrong_type else ValueError) as caught:
        build()
    assert name in str(caught.value)
    assert repr(value) in str(caught.value)


# PyTorch: AveragedModel -------------------------------------------------------

RUN_EPOCHS, RUN_STEPS, RUN_SWA_START = 8, 3, 4  # of record_averaged_model


def mean_tolerance(stacked: Tree) -> float:
    """Bound on the distance of two float32 running means of the same weights.

    Model k enters with two roundings of (q - mean)/k and one of the sum; together at
    most 3 U of the largest weight, of which a share k/n is left after n models. The
    sum over k is about 1.5 n U, for each of the two.
    """
    (n,) = {len(leaf) for leaf in stacked.values()}
    return 3 * n * U * largest(stacked)


@pytest.mark.parametrize("key", ["mean", "mean_multi"])
def test_update_average_is_averaged_model(key: str) -> None:
    """After every model; with PyTorch's default and with its fused variant."""
    recorded = read_arrays("pytorch_averaged_model.npz")
    params, means = subtree(recorded, "params"), subtree(recorded, key)
    counts = means.pop("n_averaged")
    # Both start by copying the first model, so what they are made from cannot matter.
    far_off = jax.tree.map(lambda x: 1000 + x, subtree(recorded, "initial"))
    average = swa_jax.init_average(far_off)
    for i, count in enumerate(counts):
        average = swa_jax.update_average(average, snapshot(params, i))
        assert average.num_averaged == count
        chex.assert_trees_all_close(
            average.avg_params,
            snapshot(means, i),
            rtol=0,
            atol=mean_tolerance(params),
        )
        if i == 0:
            chex.assert_trees_all_equal(average.avg_params, snapshot(means, 0))


def test_whole_run_is_pytorchs_documented_loop() -> None:
    """SGD, cosine, SWALR and AveragedModel as one optax chain.

    The recorded gradients go in; weights, averages and counts must come out. The
    documented loop averages at the end of the epochs after swa_start, which is one
    epoch later than the original repository, and never epoch swa_start itself.
    """
    recorded = read_arrays("pytorch_averaged_model.npz")
    theirs, documented = subtree(recorded, "params"), subtree(recorded, "documented")
    counts = documented.pop("n_averaged")
    cosine = optax.cosine_decay_schedule(0.5, RUN_EPOCHS)
    schedule = swa_jax.swa_schedule(
        lambda step: cosine(step // RUN_STEPS),
        0.25,
        start_step=(RUN_SWA_START + 1) * RUN_STEPS,
        anneal_steps=2 * RUN_STEPS,
        strategy="linear",
        update_every=RUN_STEPS,
    )
    tx = optax.chain(
        optax.sgd(schedule, momentum=0.9),
        swa_jax.swa(start_step=(RUN_SWA_START + 2) * RUN_STEPS, period=RUN_STEPS),
    )

    @jax.jit
    def step(params: Any, opt_state: Any, grads: Any) -> tuple[Any, Any]:
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    # Each step rounds the weight once; the rate, momentum and the product that make
    # the update are off by at most 16 U of it, summed along the weights' path.
    initial = subtree(recorded, "initial")
    path = sum(
        np.abs(np.diff(leaf, axis=0, prepend=initial[name][None])).sum(0).max()
        for name, leaf in theirs.items()
    )
    tolerance = U * (RUN_EPOCHS * RUN_STEPS * largest(theirs) + 16 * path)

    params = jax.tree.map(jnp.asarray, initial)
    opt_state = tx.init(params)
    for epoch in range(RUN_EPOCHS):
        for i in range(epoch * RUN_STEPS, (epoch + 1) * RUN_STEPS):
            grads = snapshot(subtree(recorded, "grads"), i)
            params, opt_state = step(params, opt_state, grads)
            chex.assert_trees_all_close(
                params, snapshot(theirs, i), rtol=0, atol=tolerance
            )
        assert swa_jax.swa_state(opt_state).num_averaged == counts[epoch]
        # Before the first model, PyTorch's average holds the initial weights and
        # ours reads as the current ones.
        chex.assert_trees_all_close(
            swa_jax.swa_params(opt_state, params, allow_empty=True),
            snapshot(documented, epoch) if counts[epoch] else params,
            rtol=0,
            atol=tolerance,
        )
        if not counts[epoch]:
            chex.assert_trees_all_equal(snapshot(documented, epoch), initial)
    np.testing.assert_array_equal(counts, [0, 0, 0, 0, 0, 1, 2, 3])


def test_pytorchs_bfloat16_mean_loses_what_ours_keeps() -> None:
    """A deliberate difference: narrow weights are averaged in float32."""
    recorded = read_arrays("pytorch_averaged_model.npz")
    snapshots = recorded["bfloat16/params"]
    exact = snapshots.astype(np.float64).mean(0)
    average = swa_jax.init_average(jnp.zeros(8, jnp.bfloat16))
    for weights in snapshots:
        average = swa_jax.update_average(average, jnp.asarray(weights, jnp.bfloat16))
    chex.assert_type(average.avg_params, jnp.float32)
    tolerance = mean_tolerance({"": snapshots})  # 8e-5
    np.testing.assert_allclose(average.avg_params, exact, rtol=0, atol=tolerance)
    assert np.abs(recorded["bfloat16/mean"][-1] - exact).max() > 100 * tolerance


def test_pytorchs_ema_is_optax_incremental_update() -> None:
    """Its exponential average starts from the first model, without debiasing."""
    recorded = read_arrays("pytorch_averaged_model.npz")
    params, means = subtree(recorded, "params"), subtree(recorded, "ema")
    decay = float(means.pop("decay"))
    np.testing.assert_array_equal(
        means.pop("n_averaged"), np.arange(1, RUN_EPOCHS * RUN_STEPS + 1)
    )
    average = snapshot(params, 0)
    for i in range(RUN_EPOCHS * RUN_STEPS):
        average = optax.incremental_update(snapshot(params, i), average, 1 - decay)
        # Three roundings a step on either side, of which a share `decay` stays.
        chex.assert_trees_all_close(
            average,
            snapshot(means, i),
            rtol=0,
            atol=6 * U / (1 - decay) * largest(params),
        )


# BatchNorm statistics ---------------------------------------------------------


class Dense(nn.Module):
    """The dense network of make_pytorch.py, its layers named by their position."""

    momentum: float = 0.9

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = functools.partial(
            nn.BatchNorm, use_running_average=False, momentum=self.momentum
        )
        x = nn.Dense(8, name="0")(x)
        x = nn.relu(norm(name="1")(x))
        x = nn.Dense(4, name="3")(x)
        return norm(name="4")(x)


class Conv(nn.Module):
    """The convolutional network of make_pytorch.py."""

    momentum: float = 0.99

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = functools.partial(
            nn.BatchNorm, use_running_average=False, momentum=self.momentum
        )
        x = nn.Conv(4, (3, 3), padding=1, use_bias=False, name="0")(x)
        x = nn.relu(norm(name="1")(x))
        x = nn.Conv(5, (3, 3), strides=2, padding=1, name="3")(x)
        return norm(name="4")(x)


NETWORKS = {"dense": Dense(), "conv": Conv()}
NORMS = ("1", "4")


def channels_last(x: np.ndarray) -> np.ndarray:
    """PyTorch's order of a batch's axes to JAX's."""
    return np.moveaxis(x, 1, -1)


def flax_params(arrays: Tree) -> dict[str, dict[str, np.ndarray]]:
    """PyTorch's parameters as Flax's: names, and the order of a kernel's axes."""
    params: dict[str, dict[str, np.ndarray]] = {}
    for path, value in arrays.items():
        layer, name = path.split(".")
        if layer not in NORMS and name == "weight":
            name = "kernel"
            value = np.moveaxis(value, (0, 1), (-1, -2))  # (out, in, ...)
        params.setdefault(layer, {})["scale" if name == "weight" else name] = value
    return params


@functools.cache
def forward(kind: str) -> Callable[[Any, Any, jax.Array], Any]:
    """One train-mode pass that returns the statistics; cached, to compile it once."""
    model = NETWORKS[kind]

    def batch_stats_fn(params: Any, batch_stats: Any, batch: jax.Array) -> Any:
        variables = {"params": params, "batch_stats": batch_stats}
        _, state = model.apply(variables, batch, mutable=["batch_stats"])
        return state["batch_stats"]

    return batch_stats_fn


def recompute(
    kind: str,
    batches: Iterable[np.ndarray],
    mode: Literal["equal_weighted", "sample_weighted"] = "equal_weighted",
) -> Any:
    """recompute_batch_stats on a recorded network; checks that it keeps its input."""
    recorded = subtree(read_arrays("pytorch_update_bn.npz"), kind)
    params = jax.tree.map(jnp.asarray, flax_params(subtree(recorded, "params")))
    initial = {
        norm: jax.tree.map(jnp.asarray, subtree(recorded, f"initial/{norm}"))
        for norm in NORMS
    }
    before = jax.tree.map(np.array, (params, initial))
    stats = swa_jax.recompute_batch_stats(
        forward(kind), params, initial, map(channels_last, batches), mode=mode
    )
    chex.assert_trees_all_equal((params, initial), before)
    chex.assert_trees_all_equal_shapes_and_dtypes(stats, initial)
    return stats


def recorded_batches(case: Tree) -> list[np.ndarray]:
    """The batches of a recorded case."""
    return [case[f"batch{i}"] for i in range(3)]


def biased(case: Tree, norm: str, weights: np.ndarray) -> np.ndarray:
    """The mean over batches of the biased variance, from PyTorch's unbiased ones.

    PyTorch's running variance holds n/(n - 1) times the variance of a batch with n
    values a channel, which is what Flax's holds. Each batch was recorded alone too.
    """
    n = case[f"counts/{norm}"]
    alone = np.stack([case[f"alone{i}/{norm}/var"] for i in range(len(n))])
    return np.average(alone * ((n - 1) / n)[:, None], axis=0, weights=weights)


def assert_stats_close(
    kind: str, ours: Tree, mean: np.ndarray, var: np.ndarray
) -> None:
    """Compares the statistics of one layer.

    Two errors add up, both relative to the size of what is averaged: the second
    moment, from which Flax subtracts the squared mean. One is the division by
    1 - momentum, which is known to about U / (1 - momentum) only; the other is the
    forward pass up to here, 27 or 36 products a value and twice that many roundings,
    magnified through the first normalisation.
    """
    second_moment = float((var + mean**2).max())
    tolerance = 2 * U / (1 - NETWORKS[kind].momentum) + 64 * U
    np.testing.assert_allclose(
        ours["mean"], mean, rtol=0, atol=tolerance * second_moment**0.5
    )
    np.testing.assert_allclose(ours["var"], var, rtol=0, atol=tolerance * second_moment)


@pytest.mark.parametrize("case_name", ["equal", "ragged"])
@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_equal_weighted_is_update_bn(kind: str, case_name: str) -> None:
    """Means as they are, variances after undoing n/(n - 1) batch by batch."""
    case = subtree(read_arrays("pytorch_update_bn.npz"), f"{kind}/{case_name}")
    stats = recompute(kind, recorded_batches(case))
    for norm in NORMS:
        n = case[f"counts/{norm}"]
        var = biased(case, norm, np.ones(len(n)))
        if case_name == "equal":  # one factor for all batches: no need to take apart
            np.testing.assert_allclose(
                var, case[f"stats/{norm}/var"] * (n[0] - 1) / n[0], rtol=4 * U
            )
        # What is taken apart is what update_bn put together: its own variance is the
        # plain mean of those that it finds for the batches one by one.
        alone = [case[f"alone{i}/{norm}/var"] for i in range(len(n))]
        np.testing.assert_allclose(
            np.mean(alone, 0), case[f"stats/{norm}/var"], rtol=8 * U
        )
        assert_stats_close(kind, stats[norm], case[f"stats/{norm}/mean"], var)


def test_empty_batches_raise_where_update_bn_forgets() -> None:
    """Without batches PyTorch leaves zeros and ones behind; here nothing is lost."""
    recorded = read_arrays("pytorch_update_bn.npz")
    for norm in NORMS:
        stats = subtree(recorded, f"dense/empty/stats/{norm}")
        np.testing.assert_array_equal(stats["mean"], 0)
        np.testing.assert_array_equal(stats["var"], 1)
    with pytest.raises(ValueError, match="batches is empty"):
        recompute("dense", [])


def test_batch_of_one_example_counts_where_update_bn_refuses() -> None:
    """Its biased variance is 0; PyTorch's unbiased one would be 0/0."""
    (row,) = (
        row
        for row in read_json("pytorch_rejections.json")["runs"]
        if row["call"] == "update_bn"
    )
    assert row["error"] == "ValueError"
    case = subtree(read_arrays("pytorch_update_bn.npz"), "dense/ragged")
    batch = case["batch0"]
    alone = recompute("dense", [batch])["1"]
    single = recompute("dense", [batch[:1]])["1"]
    both = recompute("dense", [batch, batch[:1]])["1"]
    n = case["counts/1"][0]
    var = case["alone0/1/var"] * (n - 1) / n
    assert_stats_close("dense", alone, case["alone0/1/mean"], var)
    assert_stats_close("dense", single, np.asarray(single["mean"]), np.zeros(8))
    mean = (case["alone0/1/mean"] + single["mean"]) / 2
    assert_stats_close("dense", both, mean, var / 2)


@pytest.mark.parametrize("source", ["original", "torchcontrib"])
@pytest.mark.parametrize("case_name", ["equal", "ragged"])
@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_sample_weighted_is_bn_update(kind: str, case_name: str, source: str) -> None:
    """The original repository weighs batches by their size, and so does torchcontrib.

    Here too a variance is corrected batch by batch. A batch of b examples weighs b,
    also in front of a convolution, where n is b times the number of positions.
    """
    name = f"{kind}/{case_name}"
    case = subtree(read_arrays("pytorch_update_bn.npz"), name)
    theirs = subtree(read_arrays(f"{source}_bn_update.npz"), name)
    batches = recorded_batches(case)
    sizes = np.array([len(batch) for batch in batches])
    stats = recompute(kind, batches, "sample_weighted")
    for norm in NORMS:
        # The recorded whole is the recorded parts, weighted by size.
        alone = np.stack([case[f"alone{i}/{norm}/var"] for i in range(len(sizes))])
        np.testing.assert_allclose(
            theirs[f"stats/{norm}/var"],
            np.average(alone, axis=0, weights=sizes),
            rtol=8 * U,
        )
        var = biased(case, norm, sizes)
        assert_stats_close(kind, stats[norm], theirs[f"stats/{norm}/mean"], var)


# The original repository, timgaripov/swa ---------------------------------------

ORIGINAL = read_json("original_train.json")
ORIGINAL_RUNS = [
    pytest.param(run, id="{epochs}-{swa_start}-{swa_c_epochs}".format_map(run))
    for run in ORIGINAL["runs"]
]


@pytest.mark.parametrize("run", ORIGINAL_RUNS)
def test_linear_to_constant_is_the_originals_schedule(run: dict[str, Any]) -> None:
    """Ours moves every step; at the first step of each epoch it is the original's."""
    steps = 3
    schedule = swa_jax.linear_to_constant_schedule(
        ORIGINAL["lr_init"], ORIGINAL["swa_lr"], run["swa_start"] * steps
    )
    ours = per_epoch(schedule, run["epochs"], steps)
    np.testing.assert_allclose(
        ours[:, 0],
        run["learning_rates"],
        rtol=0,
        atol=LR_TOLERANCE * ORIGINAL["lr_init"],
    )


@pytest.mark.parametrize("run", ORIGINAL_RUNS)
def test_period_is_the_originals_swa_c_epochs(run: dict[str, Any]) -> None:
    """start_step = swa_start S, period = swa_c_epochs S: the same epochs' ends."""
    steps = 2
    tx = swa_jax.swa(run["swa_start"] * steps, run["swa_c_epochs"] * steps)
    numbers = np.arange(1.0, run["epochs"] * steps + 1, dtype=np.float32)
    _, counts = averages(tx, {"step": numbers})
    sampled = 1 + np.flatnonzero(np.diff(counts, prepend=0))
    ends = (np.array(run["averaged_epochs"]) + 1) * steps
    np.testing.assert_array_equal(sampled, ends)


def test_average_is_the_originals_moving_average() -> None:
    """The original scales by 1 - alpha and adds; the mean is the same."""
    (run,) = (r for r in ORIGINAL["runs"] if (r["epochs"], r["swa_start"]) == (20, 10))
    recorded = read_arrays("original_average.npz")
    params, theirs = subtree(recorded, "params"), subtree(recorded, "averages")
    means, counts = averages(swa_jax.swa(10, run["swa_c_epochs"]), params)
    sampled = np.flatnonzero(np.diff(counts, prepend=0))
    np.testing.assert_array_equal(sampled, recorded["averaged_epochs"])
    chex.assert_trees_all_close(
        snapshot(means, sampled), theirs, rtol=0, atol=mean_tolerance(params)
    )


# torchcontrib ----------------------------------------------------------------

CONTRIB = read_json("torchcontrib.json")
CONTRIB_RUNS = [
    pytest.param(run, id="{swa_start}-{swa_freq}-{swa_lr}".format_map(run))
    for run in CONTRIB["runs"]
]


def contrib_swa(swa_start: int, swa_freq: int) -> optax.GradientTransformation:
    """torchcontrib averages at multiples of swa_freq that are above swa_start."""
    return swa_jax.swa((swa_start // swa_freq + 1) * swa_freq, swa_freq)


@pytest.mark.parametrize("run", CONTRIB_RUNS)
def test_torchcontribs_learning_rate(run: dict[str, Any]) -> None:
    """swa_lr from the update after number swa_start on; without it, no change.

    That differs from our swa_lr=None, which holds the rate at which SWA begins.
    """
    lr, factor = CONTRIB["lr"], CONTRIB["multiplicative_factor"]
    schedule: optax.Schedule = optax.exponential_decay(lr, 1, factor)
    if run["swa_lr"] is not None:
        schedule = swa_jax.swa_schedule(
            schedule, run["swa_lr"], run["swa_start"], anneal_steps=0
        )
    rates = run["learning_rates"]
    ours = per_epoch(schedule, len(rates), 1)[:, 0]
    # The power of the factor, rounded to float32 before, is off by another U a step.
    tolerance = (LR_TOLERANCE + len(rates) * U) * max(rates)
    np.testing.assert_allclose(ours, rates, rtol=0, atol=tolerance)


@pytest.mark.parametrize("run", CONTRIB_RUNS)
def test_torchcontribs_sampled_steps(run: dict[str, Any]) -> None:
    """Its phase comes from step 0, not from swa_start."""
    tx = contrib_swa(run["swa_start"], run["swa_freq"])
    numbers = np.arange(1.0, len(run["n_averaged"]) + 1, dtype=np.float32)
    _, counts = averages(tx, {"step": numbers})
    np.testing.assert_array_equal(counts, run["n_averaged"])


def test_torchcontribs_average() -> None:
    """The averaged weights that swap_swa_sgd puts in place, after every step."""
    recorded = read_arrays("torchcontrib_average.npz")
    params, theirs = subtree(recorded, "params"), subtree(recorded, "averages")
    means, counts = averages(contrib_swa(7, 3), params)
    np.testing.assert_array_equal(counts, recorded["n_averaged"])
    chex.assert_trees_all_close(
        snapshot(means, counts > 0), theirs, rtol=0, atol=mean_tolerance(params)
    )
