"""The contract of the BatchNorm pass: each leaf is right, kept, or refused by name.

Models here are written by hand, so that the batch's own statistics are those of the raw
data, in NumPy float64. Tolerances: 1e-5 for float32, 1e-9 for float64, 1e-3 for the
share of narrower statistics, as the docstring promises; a result in bfloat16 or float16
is rounded to it once more, and so is the batch's term.
"""

import functools
import gc
import re
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Final

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import swa_jax

#: The default run takes two cases of each test here, see conftest.py.
pytestmark = pytest.mark.sample(2)

recompute = swa_jax.recompute_batch_stats


@pytest.fixture(autouse=True)
def _as_users_write():
    """Models here broadcast as users' do."""
    with jax.numpy_rank_promotion("allow"):
        yield


def parts(model) -> Any:
    """Graph, weights, statistics and the rest; nnx's types do not say how many."""
    return nnx.split(model, nnx.Param, nnx.BatchStat, ...)


def data(sizes=(16, 16, 8), features=4, seed=0):
    """Batches whose mean and spread drift, so that no batch is like another."""
    rng = np.random.default_rng(seed)
    return [
        (rng.normal(size=(n, features)) * (1 + i) + 2 + i).astype(np.float32)
        for i, n in enumerate(sizes)
    ]


def whole(batches):
    return np.concatenate(batches).astype(np.float64)


def moments(x):
    return {"mean": x.mean(0), "var": x.var(0)}


def blend(old, new, momentum):
    return momentum * old + (1 - momentum) * new


def ema(old, x, momentum=0.9):
    return jax.tree.map(functools.partial(blend, momentum=momentum), old, moments(x))


def fresh(features=4, dtype=jnp.float32):
    return {"mean": jnp.zeros(features, dtype), "var": jnp.ones(features, dtype)}


def normal(x, stats):
    return (x - stats["mean"]) / jnp.sqrt(stats["var"] + 1e-5)


def assert_close(got, want, rtol=1e-5):
    for key in want:
        scale = np.abs(want[key]).max()
        np.testing.assert_allclose(
            np.asarray(got[key], want[key].dtype),
            want[key],
            rtol=rtol,
            atol=rtol * scale,
        )


# 1. A frozen layer, however its statistics come back.

WRAPS: dict[str, Callable[..., Any]] = {
    "plain": lambda fn: fn,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "jit of checkpoint": lambda fn: jax.jit(jax.checkpoint(fn)),
    "copy": lambda fn: lambda *args: jax.tree.map(jnp.copy, fn(*args)),
    "custom_vjp": lambda fn: _custom_vjp(fn),
    "barrier": lambda fn: lambda *args: jax.lax.optimization_barrier(fn(*args)),
    "cond": lambda fn: lambda *args: jax.lax.cond(args[2].sum() < 1e9, fn, fn, *args),
    "arithmetic": lambda fn: lambda *args: jax.tree.map(lambda x: x + 0, fn(*args)),
}


def _custom_vjp(fn):
    wrapped = jax.custom_vjp(fn)
    wrapped.defvjp(lambda *args: (fn(*args), None), lambda _, cotangents: cotangents)
    return wrapped


def second_after_frozen(params, stats, x):
    """A frozen layer, then one that is computed."""
    y = normal(x, stats["frozen"]) @ params
    return {"frozen": stats["frozen"], "live": ema(stats["live"], y)}


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_frozen_layer_stays_in_the_forward_pass(wrap):
    batches = data()
    rng = np.random.default_rng(1)
    w = rng.normal(size=(4, 4)).astype(np.float32)
    frozen = {"mean": jnp.full(4, 0.5), "var": jnp.full(4, 4.0)}
    stats = {"frozen": frozen, "live": fresh()}
    fn = WRAPS[wrap](second_after_frozen)
    with pytest.warns(UserWarning, match="no batch passed through 'frozen/mean', 'fro"):
        new = recompute(fn, jnp.asarray(w), stats, batches)
    chex.assert_trees_all_equal(new["frozen"], frozen)
    y = (whole(batches) - 0.5) / np.sqrt(4 + 1e-5) @ w.astype(np.float64)
    assert_close(new["live"], moments(y))
    kept = recompute(fn, jnp.asarray(w), stats, batches, keep="frozen")  # no warning
    chex.assert_trees_all_equal(kept, new)


@pytest.mark.parametrize("wrap", WRAPS)
def test_evaluation_mode_is_an_error_however_it_is_wrapped(wrap):
    fn = WRAPS[wrap](lambda params, stats, x: jax.tree.map(lambda s: s, stats))
    with pytest.raises(ValueError, match=r"unchanged.*training mode"):
        recompute(fn, 1.0, {"a": fresh(), "n": jnp.int32(3)}, data())


class Wrapped(nn.Module):
    """A frozen layer and a live one, through one of Flax's transformations."""

    transform: str
    frozen: bool = True

    @nn.compact
    def __call__(self, x, train=True):
        transforms: dict[str, Callable[..., Any]] = {
            "remat": nn.remat,
            "jit": nn.jit,
            "none": lambda x: x,
        }
        norm = transforms[self.transform](nn.BatchNorm)
        x = norm(use_running_average=self.frozen or not train, name="first")(x)
        x = nn.Dense(4, name="dense")(x)
        return norm(use_running_average=not train, name="second")(x)


@pytest.mark.parametrize("transform", ["remat", "jit", "none"])
def test_frozen_under_flax_transformations(transform):
    net, batches = Wrapped(transform), data()
    variables = net.init(jax.random.key(0), batches[0])

    def fn(params, stats, x):
        variables = {"params": params, "batch_stats": stats}
        return net.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]

    stats = variables["batch_stats"]
    stats["first"] = {"mean": jnp.full(4, 0.5), "var": jnp.full(4, 4.0)}
    new = recompute(fn, variables["params"], stats, batches, keep="first")
    kernel = np.asarray(variables["params"]["dense"]["kernel"], np.float64)
    assert_close(
        new["second"], moments((whole(batches) - 0.5) / np.sqrt(4 + 1e-5) @ kernel)
    )


@pytest.mark.parametrize("transform", ["jit", "remat"])
def test_frozen_under_nnx_transformations(transform):
    batches = data()
    frozen = nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0))
    model = nnx.Sequential(frozen, nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    frozen.mean[...] = jnp.full(4, 0.5)
    graphdef, params, stats, rest = parts(model)

    def fn(params, stats, x):
        model = nnx.merge(graphdef, params, stats, rest, copy=True)
        runs: dict[str, Callable[..., Any]] = {"jit": nnx.jit, "remat": nnx.remat}
        run = runs[transform]
        run(lambda model, x: model(x))(model, x)
        return nnx.state(model, nnx.BatchStat)

    with pytest.warns(UserWarning, match="no batch passed through"):
        new = recompute(fn, params, stats, batches)
    second = new["layers"][1]
    want = moments((whole(batches) - 0.5) / np.sqrt(1 + 1e-5))
    assert_close({k: second[k][...] for k in want}, want)


# 2. Shares that change from batch to batch.


def cumulative(form):
    def fn(params, stats, x):
        n = stats["n"]

        def one(old, new):
            if form == "step":
                return old + (new - old) / (n + 1)
            if form == "weights":
                return n / (n + 1) * old + 1 / (n + 1) * new
            return (n * old + new) / (n + 1)

        new = jax.tree.map(one, {k: stats[k] for k in ("mean", "var")}, moments(x))
        return {**new, "n": n + 1}

    return fn


@pytest.mark.parametrize("form", ["step", "weights", "sum"])
@pytest.mark.parametrize("counter", [0, 9, 1000])
def test_cumulative_averages(form, counter):
    batches = data((16, 16, 8, 16))
    stats = {"mean": jnp.full(4, 7.0), "var": jnp.full(4, 7.0), "n": jnp.int32(counter)}
    if counter == 1000:  # 1 - 1/1004 may be 0.999004 as well
        with pytest.raises(ValueError, match="counter at 0"):
            recompute(cumulative(form), 1.0, stats, batches)
        return
    new = recompute(cumulative(form), 1.0, stats, batches)
    assert int(new["n"]) == counter + 4
    assert_close(new, moments(whole(batches)))


@pytest.mark.parametrize("form", ["step", "weights", "sum"])
def test_a_cumulative_average_far_on_is_right_or_refused(form):
    """1 / 3,000,001 is five spacings of float32 below 1: nothing tells it apart."""
    stats = {**fresh(), "n": jnp.int32(3_000_000)}
    with pytest.raises(ValueError, match=r"share of the batch.*counter at 0"):
        recompute(cumulative(form), 1.0, stats, data())


@pytest.mark.parametrize("counter", [0, 1, 5, 100, 888, 10**6])
def test_a_momentum_that_warms_up(counter):
    def fn(params, stats, x):
        n = stats["n"]
        momentum = jnp.minimum(0.99, (1 + n) / (10 + n))
        new = ema({k: stats[k] for k in ("mean", "var")}, x, momentum)
        return {**new, "n": n + 1}

    batches = data((16, 16, 8, 16))
    new = recompute(fn, 1.0, {**fresh(), "n": jnp.int32(counter)}, batches)
    assert_close(new, moments(whole(batches)))


@pytest.mark.parametrize("flag", [True, False])
def test_a_first_batch_that_replaces(flag):
    def fn(params, stats, x):
        old = {k: stats[k] for k in ("mean", "var")}
        momentum = jnp.where(stats["first"], 0.0, 0.99)
        return {**ema(old, x, momentum), "first": jnp.zeros_like(stats["first"])}

    batches = data()
    new = recompute(fn, 1.0, {**fresh(), "first": jnp.array(flag)}, batches)
    assert not new["first"]
    assert_close(new, moments(whole(batches)))


# 3. A leaf that follows another.


@pytest.mark.parametrize(
    ("decay", "counter", "stale"),
    [
        (0.9, 0, False),
        (0.9, 1, True),
        (0.9, 5000, True),
        (0.99, 0, True),
        (0.999, 10, True),
        (0.9999, 0, False),
        (0.9999, 1, False),
        (0.9999, 5000, True),
    ],
)
def test_a_zero_debiased_average_is_refused(decay, counter, stale):
    def fn(params, stats, x):
        n = stats["n"] + 1
        hidden = decay * stats["hidden"] + (1 - decay) * x.mean(0)
        return {"hidden": hidden, "average": hidden / (1 - decay**n), "n": n}

    value = 2.5 if stale else 0.0
    stats = {
        "hidden": jnp.full(4, value),
        "average": jnp.full(4, value),
        "n": jnp.int32(counter),
    }
    with pytest.raises(ValueError, match=r"\['average'\].*follows 'hidden'"):
        recompute(fn, 1.0, stats, data())
    with pytest.warns(UserWarning, match="'hidden'"):  # it might be a variance
        new = recompute(fn, 1.0, stats, data(), keep="average")
    np.testing.assert_allclose(new["hidden"], whole(data()).mean(0), rtol=1e-5)


def two_layers(normalise):
    """The second layer sees what the first one normalises."""

    def fn(params, stats, x):
        first = ema(stats["first"], x)
        y = jnp.tanh(normalise(x, stats["first"], first))
        return {"first": first, "second": ema(stats["second"], y)}

    return fn


def batch_renorm(x, old, new, r_max=3.0, d_max=5.0):
    batch = {"mean": x.mean(0), "var": x.var(0)}
    sigma, running = jnp.sqrt(batch["var"] + 1e-5), jnp.sqrt(old["var"] + 1e-5)
    r = jnp.clip(sigma / running, 1 / r_max, r_max)
    d = jnp.clip((batch["mean"] - old["mean"]) / running, -d_max, d_max)
    return (x - batch["mean"]) / sigma * r + d


@pytest.mark.parametrize("start", [0.0, 1.0, 1e3])
@pytest.mark.parametrize(
    "normalise",
    [
        lambda x, old, new: normal(x, old),
        lambda x, old, new: normal(x, new),
        batch_renorm,
    ],
    ids=["old", "new", "renorm"],
)
def test_a_layer_that_normalises_by_running_statistics_is_refused(normalise, start):
    stats = {
        "first": {"mean": jnp.full(4, start), "var": jnp.full(4, start)},
        "second": fresh(),
    }
    with pytest.raises(ValueError, match=r"\['second'\].*follows .*'first/"):
        recompute(two_layers(normalise), 1.0, stats, data())


def test_batch_renormalisation_that_has_not_begun_is_right():
    fn = two_layers(functools.partial(batch_renorm, r_max=1.0, d_max=0.0))
    batches = data()
    new = recompute(fn, 1.0, {"first": fresh(), "second": fresh()}, batches)
    assert_close(new["first"], moments(whole(batches)))
    y = [
        np.tanh((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5))
        for x in map(np.float64, batches)
    ]
    assert_close(new["second"], moments(np.concatenate(y)))


def test_batch_renormalisation_that_begins_during_the_pass_is_refused():
    def fn(params, stats, x):
        r_max = jnp.where(stats["n"] < 2, 1.0, 3.0)
        d_max = jnp.where(stats["n"] < 2, 0.0, 5.0)
        normalise = functools.partial(batch_renorm, r_max=r_max, d_max=d_max)
        new = two_layers(normalise)(params, stats, x)
        return {**new, "n": stats["n"] + 1}

    stats = {"first": fresh(), "second": fresh(), "n": jnp.int32(0)}
    recompute(fn, 1.0, stats, data((8, 8)))
    with pytest.raises(ValueError, match=r"\['second'\].*follows"):
        recompute(fn, 1.0, stats, data((8, 8, 8)))


def test_a_derived_leaf_is_refused():
    def fn(params, stats, x):
        n = stats["n"]
        var = stats["var"] + (x.var(0) - stats["var"]) / (n + 1)
        return {"std": jnp.sqrt(var), "var": var, "n": n + 1}

    stats = {"std": jnp.ones(4), "var": jnp.ones(4), "n": jnp.int32(3)}
    with pytest.raises(ValueError, match=r"\['std'\].*follows 'var'"):
        recompute(fn, 1.0, stats, data())


def test_layers_stacked_in_one_leaf_that_follow_each_other_are_refused():
    def fn(params, stats, x):
        def layer(x, stats):
            return jnp.tanh(normal(x, stats)), ema(stats, x, 0.9999)

        return jax.lax.scan(layer, x, stats)[1]

    stats = jax.tree.map(lambda x: jnp.stack([x] * 3), fresh())
    with pytest.raises(ValueError, match="not a running average"):
        recompute(fn, 1.0, stats, data())


def test_layers_under_scan_are_right_in_one_forward_pass():
    def layer(x, stats):
        mean, var = x.mean(0), x.var(0)
        y = jnp.tanh((x - mean) / jnp.sqrt(var + 1e-5) + mean)
        return y, ema(stats, x)

    runs = []

    def fn(params, stats, x):
        jax.debug.callback(lambda: runs.append(1))
        return jax.lax.scan(layer, x, stats)[1]

    batches = data()
    new = recompute(
        fn, 1.0, jax.tree.map(lambda x: jnp.stack([x] * 3), fresh()), batches
    )
    jax.effects_barrier()
    assert len(runs) == len(batches) + 1  # the first one twice
    per_batch: list[list[np.ndarray]] = [[], [], []]
    for x in (np.asarray(x, np.float64) for x in batches):
        for depth in range(3):
            per_batch[depth].append(x)
            x = np.tanh((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) + x.mean(0))
    want = [moments(np.concatenate(x)) for x in per_batch]
    assert_close(new, {k: np.stack([w[k] for w in want]) for k in ("mean", "var")})


# 4. Layers that not every batch passes through.


@pytest.mark.parametrize("jitted", [True, False])
def test_batches_that_alternate_between_two_heads(jitted):
    def fn(params, stats, batch):
        out = {}
        for head in ("a", "b"):
            on = batch["use"] == (head == "a")
            moved = ema(stats[head], batch["x"])
            out[head] = jax.tree.map(
                lambda m, s, on=on: jnp.where(on, m, s), moved, stats[head]
            )
        return {**out, "trunk": ema(stats["trunk"], batch["x"])}

    batches = data((16, 8, 16, 8, 4))
    use = [True, False, True, False, False]
    stats = {
        name: {"mean": jnp.full(4, 9.0), "var": jnp.full(4, 9.0)}
        for name in ("a", "b", "trunk")
    }
    new = recompute(
        jax.jit(fn) if jitted else fn,
        1.0,
        stats,
        [{"x": x, "use": np.bool_(u)} for x, u in zip(batches, use, strict=True)],
    )
    assert_close(new["trunk"], moments(whole(batches)))
    for head, wanted in (("a", True), ("b", False)):
        mine = [x for x, u in zip(batches, use, strict=True) if u is wanted]
        assert_close(new[head], moments(whole(mine)))


def test_heads_chosen_in_python_by_the_structure_of_the_batch():
    def fn(params, stats, batch):
        [(head, x)] = batch.items()
        return {**stats, head: ema(stats[head], x)}

    first, second, third = data((16, 8, 4))
    stats = {"a": fresh(), "b": fresh(), "never": fresh()}
    with pytest.warns(UserWarning, match="no batch passed through 'never/mean'"):
        new = recompute(fn, 1.0, stats, [{"a": first}, {"b": second}, {"a": third}])
    assert_close(new["a"], moments(whole([first, third])))
    assert_close(new["b"], moments(np.float64(second)))
    chex.assert_trees_all_equal(new["never"], stats["never"])


# 5. Names, shapes, pairs.


class TwoHeads(nn.Module):
    """Heads that are called like statistics."""

    @nn.compact
    def __call__(self, x):
        for name in ("mean", "var"):
            y = nn.Dense(3, name=f"to_{name}")(x)
            Head(name=name)(y)


class Head(nn.Module):
    """One BatchNorm."""

    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(x)


def test_modules_that_are_called_mean_and_var():
    net, batches = TwoHeads(), data()
    variables = net.init(jax.random.key(0), batches[0])

    def fn(params, stats, x):
        variables = {"params": params, "batch_stats": stats}
        return net.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]

    new = recompute(fn, variables["params"], variables["batch_stats"], batches)
    for name in ("mean", "var"):
        kernel = np.asarray(variables["params"][f"to_{name}"]["kernel"], np.float64)
        assert_close(new[name]["BatchNorm_0"], moments(whole(batches) @ kernel))


@pytest.mark.parametrize(
    ("mean", "var"),
    [
        ("mean", "var"),
        ("running_mean", "running_var"),
        ("moving_mean", "moving_variance"),
        ("mean_ema", "var_ema"),
        ("mu", "sigma2"),
    ],
)
def test_pairs_by_name(mean, var):
    def fn(params, stats, x):
        found = {mean: x.mean(0), var: x.var(0)}
        return {
            "norm": jax.tree.map(lambda o, b: 0.9 * o + 0.1 * b, stats["norm"], found)
        }

    batches = data()
    stats = {"norm": {mean: jnp.zeros(4), var: jnp.ones(4)}}
    pairs = {"sigma2": "mu"} if mean == "mu" else None
    new = recompute(fn, 1.0, stats, batches, pairs=pairs)["norm"]
    assert_close({"mean": new[mean], "var": new[var]}, moments(whole(batches)))


@pytest.mark.parametrize("kind", [tuple, list])
def test_tuples_and_lists(kind):
    def fn(params, stats, x):
        return kind(
            0.9 * o + 0.1 * b for o, b in zip(stats, (x.mean(0), x.var(0)), strict=True)
        )

    batches, stats = data(), kind([jnp.zeros(4), jnp.ones(4)])
    new = recompute(fn, 1.0, stats, batches, pairs={"1": "0"})
    assert_close({"mean": new[0], "var": new[1]}, moments(whole(batches)))
    with pytest.warns(UserWarning, match=r"'pooled' found no mean.*'1'.*pairs="):
        recompute(fn, 1.0, stats, batches)
    within = recompute(fn, 1.0, stats, batches, mode="sample_weighted")  # no warning
    want = sum(len(x) * np.float64(x).var(0) for x in batches) / len(whole(batches))
    np.testing.assert_allclose(within[1], want, rtol=1e-5)


def test_pairs_under_different_parents_by_whole_names():
    def fn(params, stats, x):
        found = {f"{key}_ema": {"hidden": x} for key, x in moments(x).items()}
        return {"n": jax.tree.map(lambda o, b: 0.9 * o + 0.1 * b, stats["n"], found)}

    zero = {"hidden": jnp.zeros(4)}
    pairs = {"n/var_ema/hidden": "n/mean_ema/hidden"}
    stats = {"n": {"mean_ema": zero, "var_ema": zero}}
    new = recompute(fn, 1.0, stats, data(), pairs=pairs)["n"]
    got = {key: new[f"{key}_ema"]["hidden"] for key in ("mean", "var")}
    assert_close(got, moments(whole(data())))


def test_shapes_that_do_not_fit_make_no_pair():
    def fn(params, stats, x):
        centred = x - x.mean(0)
        found = {
            "a": {"mean": x.mean(0), "var": x.var()},
            "b": {"mean": x.mean(0), "var": centred.T @ centred / len(x)},
        }
        return jax.tree.map(lambda o, b: 0.9 * o + 0.1 * b, stats, found)

    stats = {
        "a": {"mean": jnp.zeros(4), "var": jnp.ones(())},
        "b": {"mean": jnp.zeros(4), "var": jnp.eye(4)},
    }
    batches = data()
    with pytest.warns(UserWarning, match="'a/var'"):
        new = recompute(fn, 1.0, stats, batches)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, stats)
    sizes = np.array([len(x) for x in batches]) / len(whole(batches))
    want = sum(
        w * np.cov(np.float64(x).T, bias=True)
        for w, x in zip(sizes, batches, strict=True)
    )
    np.testing.assert_allclose(new["b"]["var"], want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(new["b"]["var"], np.asarray(new["b"]["var"]).T)
    variance = sum(w * np.float64(x).var() for w, x in zip(sizes, batches, strict=True))
    np.testing.assert_allclose(new["a"]["var"], variance, rtol=1e-5)


def test_a_variance_whose_mean_is_frozen_says_so():
    def fn(params, stats, x):
        return {"mean": stats["mean"], "var": ema(stats, x)["var"]}

    with (
        pytest.warns(UserWarning, match="no batch passed through 'mean'"),
        pytest.warns(UserWarning, match="'pooled' found no mean that belongs to 'var'"),
    ):
        recompute(fn, 1.0, fresh(), data())


def test_counters_alone_are_carried():
    new = recompute(lambda p, s, x: {"n": s["n"] + 1}, 1.0, {"n": jnp.int32(2)}, data())
    assert int(new["n"]) == 5


# 7. Precision.


MOMENTA = [0.0, 0.001, 0.1, 0.5, 0.9, 0.99, 0.995, 0.997, 0.999, 0.9997, 0.9999]
MOMENTA += [0.99999, 0.999999, 1 - 2**-13, 1 - 2**-20, 0.987, 1 - 1 / 1251, 0.7421875]


def one_mean(form, momentum, dtype, old, new):
    """A running mean, its momentum written in one of several ways."""
    if form == "flax":
        return momentum * old + (1 - momentum) * new
    if form == "lerp":
        return old + (1 - momentum) * (new - old)
    m, rest = dtype(momentum), dtype(1 - momentum)
    if form == "haiku":
        rest = 1 - m
    return (m * old + rest * new).astype(dtype)


def means_of(form, dtype, momenta=MOMENTA):
    """A model with one running mean for each momentum, and its statistics."""

    def fn(params, stats, x):
        new = x.astype(dtype).mean(0)
        return {
            f"m{i}": one_mean(form, momentum, dtype, stats[f"m{i}"], new)
            for i, momentum in enumerate(momenta)
        }

    return fn, {f"m{i}": jnp.ones(4, dtype) for i in range(len(momenta))}


def all_that_is_not_refused(fn, stats, batches):
    """The result, less the leaves that an error or a warning names."""
    refused: list[str] = []
    while True:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                new = recompute(fn, 1.0, stats, batches, mode=WITHIN, keep=refused)
            except ValueError as error:
                named = re.findall(r"not a running.*keep='(m\d+)'", str(error))
                if not named:
                    raise
                refused += named
                continue
        # Where 1 - a has been rounded to 0 the model does nothing.
        idle = re.findall(r"'(m\d+)'", " ".join(str(w.message) for w in caught))
        more = [name for name in idle if name not in refused]
        if not more:
            return {name: x for name, x in new.items() if name not in refused}
        refused += more


NARROW = ("haiku", "typed")  # what rounds the momentum to the statistics' dtype
WITHIN: Final = "sample_weighted"  # nothing here is a variance


@pytest.mark.slow
@pytest.mark.parametrize("form", ["flax", "lerp", "haiku", "typed"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_momenta_are_told_exactly_or_refused(form, dtype):
    batches = [x / 8 for x in data((32, 32, 16))]
    # Each refusal compiles anew: fewer where many are refused.
    seen = [0.0, 0.5, 0.9, 0.99, 0.997, 0.7421875] if form in NARROW else MOMENTA
    momenta = MOMENTA if dtype == jnp.float32 else seen
    fn, stats = means_of(form, dtype, momenta)
    new = all_that_is_not_refused(fn, stats, batches)
    want = whole(batches).mean(0)
    for name, got in new.items():
        momentum = momenta[int(name[1:])]
        rtol = 1e-5 if dtype == jnp.float32 else 1e-3 + 4 * float(jnp.finfo(dtype).eps)
        if form == "haiku":
            # The docstring says so: a short decimal is taken to be subtracted first.
            rounded = 1 - float(jnp.asarray(momentum, dtype))
            rtol += abs(rounded / (1 - momentum) - 1)
        assert got.dtype == dtype
        np.testing.assert_allclose(np.float64(got), want, rtol=rtol, err_msg=momentum)
    refused = {momenta[int(name[1:])] for name in stats.keys() - new.keys()}
    if dtype == jnp.float32:
        assert not refused
    elif form == "flax" and dtype == jnp.bfloat16:
        # Fed in float32, Python's momenta are seen whole; unless they fit in bfloat16.
        assert refused == {0.7421875}
    else:
        assert not refused & {0.0, 0.5, 0.9}


@pytest.mark.parametrize("form", ["flax", "lerp", "haiku"])
def test_float64(form, enable_x64):
    batches = [np.float64(x) for x in data()]
    momenta = [*MOMENTA, 0.99987654321, 1 - 1 / 3_000_001]
    fn, stats = means_of(form, jnp.float64, momenta)
    new = recompute(fn, 1.0, stats, batches, mode=WITHIN)
    for got in new.values():
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, whole(batches).mean(0), rtol=1e-9)


def test_a_momentum_that_float32_does_not_hold_is_refused():
    with pytest.raises(ValueError, match=r"a = 0.9998765.* in float32.*keep='mean'"):
        recompute(lambda p, s, x: ema(s, x, 0.9998765432), 1.0, fresh(), data())


# 8. What is not finite, complex, empty, or no data.


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", [0, 1, 3])
def test_what_is_not_finite_is_named_with_its_batch(bad, where):
    batches = data((8, 8, 8, 8))
    batches[where][2, 1] = bad
    which = f"batch {where + 1}" if where else "the first batch"
    with pytest.raises(swa_jax.NonFiniteError, match=rf"\['mean'\].*{which};"):
        recompute(lambda p, s, x: ema(s, x), 1.0, fresh(), batches)


@pytest.mark.parametrize("factor", [1e10, 1e17, 1e30, 1e37])
def test_statistics_near_overflow_are_right_or_not_finite(factor):
    batches = data((8, 8))
    fed = [np.float32(factor) * x for x in batches]
    if factor > 1e18:  # the square is beyond float32
        with pytest.raises(swa_jax.NonFiniteError, match="is not finite"):
            recompute(lambda p, s, x: ema(s, x), 1.0, fresh(), fed)
        return
    new = recompute(lambda p, s, x: ema(s, x), 1.0, fresh(), fed)
    assert_close(new, moments(whole(fed)))


def test_complex_means():
    rng = np.random.default_rng(0)
    batches = [
        (rng.normal(size=(n, 3)) + 1j * rng.normal(size=(n, 3)) + 2 - 1j * n).astype(
            np.complex64
        )
        for n in (8, 4)
    ]

    def fn(params, stats, x):
        found = {"mean": x.mean(0), "var": jnp.square(jnp.abs(x - x.mean(0))).mean(0)}
        return jax.tree.map(lambda o, b: 0.9 * o + 0.1 * b, stats, found)

    stats = {"mean": jnp.zeros(3, jnp.complex64), "var": jnp.ones(3)}
    new = recompute(fn, 1.0, stats, batches)
    x = np.concatenate(batches).astype(np.complex128)
    assert new["mean"].dtype == np.complex64
    np.testing.assert_allclose(new["mean"], x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(new["var"], x.var(0), rtol=1e-5)


def test_an_empty_leaf_is_kept():
    stats = {**fresh(), "none": jnp.zeros((0, 4))}

    def fn(params, stats, x):
        new = ema({k: stats[k] for k in ("mean", "var")}, x)
        return {**new, "none": 0.9 * stats["none"]}

    new = recompute(fn, 1.0, stats, data())
    assert new["none"].shape == (0, 4)
    assert_close(new, moments(whole(data())))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (np.zeros((4, 4), np.float32), r"one array of shape \(4, 4\).*\[batch\]"),
        (jnp.zeros((4, 4)), r"one array of shape \(4, 4\)"),
        ({"x": np.zeros((4, 4))}, r"one dict.*\[batch\]"),
        (lambda: [], r"got function.*pass batches\(\)"),
        (None, "got NoneType"),
        (3, "got int"),
    ],
)
def test_what_is_no_stream_of_batches(batches, message):
    with pytest.raises(TypeError, match=message):
        recompute(lambda p, s, x: ema(s, x), 1.0, fresh(), batches)


@pytest.mark.parametrize("raw", [True, False])
def test_a_key_that_sorts_before_the_images(raw):
    key = jax.random.PRNGKey(0) if raw else jax.random.key(0)
    batches = data((16, 8))
    fed = [{"a_key": key, "images": x, "rate": 0.5} for x in batches]
    new = recompute(lambda p, s, b: ema(s, b["images"]), 1.0, fresh(), fed)
    assert_close(new, moments(whole(batches)))


def test_arrays_that_disagree_need_a_weight():
    batches = data((16, 8))
    fed = [{"x": x, "groups": np.zeros(len(x) // 4)} for x in batches]

    def fn(params, stats, batch):
        return ema(stats, batch["x"])

    with pytest.raises(ValueError, match=r"must agree on axis 0.*batch_weight="):
        recompute(fn, 1.0, fresh(), fed)
    new = recompute(fn, 1.0, fresh(), fed, batch_weight=lambda b: len(b["x"]))
    assert_close(new, moments(whole(batches)))


def test_padded_batches_weigh_by_their_valid_rows():
    rows = data((64, 64))
    valid = [64, 2]

    def fn(params, stats, batch):
        mask = batch["mask"][:, None]
        n = mask.sum()
        mean = (batch["x"] * mask).sum(0) / n
        var = (jnp.square(batch["x"] - mean) * mask).sum(0) / n
        found = {"mean": mean, "var": var}
        return jax.tree.map(lambda o, b: 0.9 * o + 0.1 * b, stats, found)

    fed = [
        {"x": x, "mask": (np.arange(64) < n).astype(np.float32)}
        for x, n in zip(rows, valid, strict=True)
    ]
    new = recompute(fn, 1.0, fresh(), fed, batch_weight=lambda b: b["mask"].sum())
    assert_close(new, moments(whole([x[:n] for x, n in zip(rows, valid, strict=True)])))
    for bad in (0, -1, np.nan, "many", np.ones(64)):

        def weight(b, bad=bad):
            return bad

        with pytest.raises(ValueError, match="batch_weight must give one positive"):
            recompute(fn, 1.0, fresh(), fed, batch_weight=weight)
    with pytest.raises(ValueError, match="no meaning with mode='equal_weighted'"):
        recompute(fn, 1.0, fresh(), fed, batch_weight=len, mode="equal_weighted")


# 9. Memory.


def live():
    gc.collect()
    return len(jax.live_arrays()), len(jax.devices()[0].client.live_executables())


@pytest.mark.slow
def test_nothing_outlives_the_calls():
    dead: list[weakref.ref[Any]] = []

    def call():
        table = jnp.ones((64, 64))

        def fn(params, stats, x):
            return ema(stats, x + table[0, :4] - 1)

        dead.extend([weakref.ref(fn), weakref.ref(table)])
        recompute(fn, 1.0, fresh(), data((4, 4)))

    call()
    before = live()
    for _ in range(5):
        call()
    gc.collect()
    assert [ref() for ref in dead] == [None] * len(dead)
    assert live() == before


# 10. Under pmap, jit and axes.


def stack(tree, devices=8):
    return jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * devices), tree)


def split(batches, devices=8):
    return [x.reshape(devices, -1, *x.shape[1:]) for x in batches]


def test_pmap_with_one_array_each():
    batches = data((64, 32, 16))
    new = recompute(
        lambda p, s, x: ema(s, p * x),
        stack(jnp.ones(4)),
        stack(fresh()),
        split(batches),
        axis_name="devices",
    )
    for device in range(8):
        assert_close(
            jax.tree.map(lambda x, d=device: x[d], new), moments(whole(batches))
        )


def test_pmap_with_weights_for_each_device():
    rows = data((64, 64))
    valid = np.array([8, 8, 8, 8, 8, 4, 2, 0])
    mask = (np.arange(8) < valid[:, None]).astype(np.float32)

    def fn(params, stats, batch):
        m = batch["mask"][:, None]
        mean = (batch["x"] * m).sum(0) / m.sum()
        found = {
            "mean": mean,
            "var": (jnp.square(batch["x"] - mean) * m).sum(0) / m.sum(),
        }
        return jax.tree.map(lambda o, b: 0.9 * o + 0.1 * b, stats, found)

    fed = [{"x": x, "mask": mask} for x in split(rows)]
    seen = [x[mask.astype(bool)] for x in split(rows)]
    with pytest.raises(swa_jax.NonFiniteError):
        recompute(fn, stack(1.0), stack(fresh()), fed, axis_name="d")
    new = recompute(
        fn,
        stack(1.0),
        stack(fresh()),
        fed,
        axis_name="d",
        batch_weight=lambda b: b["mask"].sum(1),
    )
    assert_close(jax.tree.map(lambda x: x[3], new), moments(whole(seen)))


def test_mistakes_around_axes_name_the_fix():
    batches = data((16, 16))

    def fn(params, stats, x):
        return ema(stats, params * jax.lax.pmean(x, "devices"))

    with pytest.raises(ValueError, match=r"mapped axis that is not there.*axis_name="):
        recompute(fn, 1.0, fresh(), batches)
    with pytest.raises(ValueError, match=r"params.* has none.*jnp.stack"):
        recompute(fn, 1.0, stack(fresh()), split(batches), axis_name="devices")
    with pytest.raises(ValueError, match=r"expected \(8, 4\).*axis_name="):
        recompute(
            lambda p, s, x: jax.tree.map(
                lambda a: a[:, :, 0].mean(1), {"mean": x, "var": x}
            ),
            stack(1.0),
            stack(fresh()),
            split(batches),
        )
    with pytest.raises(ValueError, match=r"leading axis.*\(8, examples"):
        recompute(fn, stack(1.0), stack(fresh()), batches, axis_name="devices")
    with pytest.raises(TypeError, match=r"being traced.*outside jax.jit"):
        jax.jit(lambda p: recompute(fn, p, fresh(), batches))(1.0)


def test_where_implicit_transfers_are_forbidden():
    batches, stats = data(), fresh()
    with jax.transfer_guard("disallow"):
        new = recompute(lambda p, s, x: ema(s, p * x), np.float32(1), stats, batches)
    assert_close(new, moments(whole(batches)))


# 11. Recipes with nnx; keep=.


class Regularised(nnx.Module):
    """BatchNorm, Dropout and spectral normalisation."""

    def __init__(self, rngs, *, holds_rngs, spectral=False):
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.spectral = (
            nnx.SpectralNorm(nnx.Linear(4, 4, rngs=rngs), rngs=rngs)
            if spectral
            else None
        )
        self.drop = nnx.Dropout(0.5, rngs=rngs if holds_rngs else None)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x, rngs=None):
        x = self.norm(self.dense(x))
        if self.spectral is not None:
            x = self.spectral(x, update_stats=True)
        return self.drop(x, rngs=rngs)


# Without a copy, nnx itself refuses to count up random numbers of another trace.
@pytest.mark.parametrize(
    ("holds_rngs", "copy"), [(True, True), (False, True), (False, False)]
)
def test_nnx_with_dropout(holds_rngs, copy):
    model = Regularised(nnx.Rngs(0), holds_rngs=holds_rngs)
    graphdef, params, stats, rest = parts(model)

    def fn(params, stats, x):
        model = nnx.merge(graphdef, params, stats, rest, copy=copy)
        model(x, None if holds_rngs else nnx.Rngs(1))
        return nnx.state(model, nnx.BatchStat)

    batches = data()
    new = recompute(fn, params, stats, batches)
    x = whole(batches) @ np.asarray(model.dense.kernel[...], np.float64)
    want = moments(x)
    assert_close({k: new["norm"][k][...] for k in want}, want)


@pytest.mark.skipif(
    not hasattr(nnx, "SpectralNorm"), reason="Flax 0.12.0 has it in linen alone"
)
def test_spectral_norm_needs_keep():
    model = Regularised(nnx.Rngs(0), holds_rngs=True, spectral=True)
    graphdef, params, stats, rest = parts(model)

    def fn(params, stats, x):
        model = nnx.merge(graphdef, params, stats, rest, copy=True)
        model(x)
        return nnx.state(model, nnx.BatchStat)

    batches = data()
    with pytest.raises(ValueError, match=r"spectral.*keep=.spectral"):
        recompute(fn, params, stats, batches)
    want = moments(whole(batches) @ np.asarray(model.dense.kernel[...], np.float64))
    for keep in ("spectral", ["spectral"], lambda name: name.startswith("spectral/")):
        new = recompute(fn, params, stats, batches, keep=keep)
        assert_close({k: new["norm"][k][...] for k in want}, want)
        chex.assert_trees_all_equal(new["spectral"], stats["spectral"])


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        ("nothing", ValueError, r"keep='nothing' names no leaf.*'mean', 'var'"),
        ("ea", ValueError, "names no leaf"),
        ([3], TypeError, "keep must be the name of a leaf.*got int"),
    ],
)
def test_keep_that_means_nothing(keep, error, message):
    with pytest.raises(error, match=message):
        recompute(lambda p, s, x: ema(s, x), 1.0, fresh(), data(), keep=keep)


# Where the old values cannot be run together.


def opaque(params, stats, x):
    """A layer whose statistics come out of a call that JAX cannot look into."""

    def host(x, mean, var):
        new = 0.9 * mean + 0.1 * x.mean(0), 0.9 * var + 0.1 * x.var(0)
        return (*(v.astype(np.float32) for v in new), np.tanh(x).astype(np.float32))

    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype),
        (stats["mean"], stats["var"], x),
    )
    mean, var, _ = jax.pure_callback(host, shapes, x, stats["mean"], stats["var"])
    return {"mean": mean, "var": var}


def test_an_opaque_layer_does_not_pay_for_every_batch():
    batches = data((8,) * 20)
    calls = []

    def fn(params, stats, x):
        jax.debug.callback(lambda: calls.append(1))
        return opaque(params, stats, x)

    new = recompute(fn, 1.0, fresh(), batches)
    jax.effects_barrier()
    assert_close(new, moments(whole(batches)))
    # The first batch from all old values, twice, and the last once: not each batch.
    old_values = 3 + 4
    assert len(calls) == 19 + 3 * old_values


# Found by trying to break it.


def test_a_stream_may_fill_one_buffer_again_and_again():
    """The CPU would take an aligned NumPy array of this size as it lies in memory."""
    batches = data((16384,) * 8, features=16)
    memory = np.zeros(2**20 + 64, np.uint8)
    start = -memory.ctypes.data % 64
    buffer = memory[start : start + 2**20].view(np.float32).reshape(-1, 16)

    def stream():
        for x in batches:
            buffer[...] = x
            yield buffer

    new = recompute(lambda p, s, x: ema(s, x), 1.0, fresh(16), stream())
    assert_close(new, moments(whole(batches)))


@pytest.mark.parametrize("own", [np.inf, np.nan, 1e-40])
def test_old_statistics_may_be_anything(own):
    stats = {"mean": jnp.full(4, own), "var": jnp.full(4, own)}
    with np.errstate(all="raise"):
        new = recompute(lambda p, s, x: ema(s, x), 1.0, stats, data())
    assert_close(new, moments(whole(data())))


@pytest.mark.parametrize("beside", [True, False])
def test_an_average_that_leaves_outliers_out_is_refused(beside):
    """Idle from variance 0 and from far above, but not from its own values."""

    def fn(params, stats, x):
        old = stats["robust"]
        accepted = jnp.abs(x.mean(0) - old["mean"]) < 3 * jnp.sqrt(old["var"])
        new = jax.tree.map(
            lambda new, old: jnp.where(accepted, new, old), ema(old, x), old
        )
        return {k: new if k == "robust" else ema(v, x) for k, v in stats.items()}

    stats = {"robust": {"mean": jnp.full(4, 2.0), "var": jnp.full(4, 4.0)}}
    if beside:
        stats["plain"] = fresh()
    with pytest.raises(ValueError, match=r"outlier.*'robust/mean'.*keep="):
        recompute(fn, 1.0, stats, data())


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_statistics_that_are_sharded_over_channels(axis_type):
    mesh = Mesh(np.array(jax.devices()), ("channels",), axis_types=(axis_type,))
    over = NamedSharding(mesh, P("channels"))
    batches = data(features=8)
    with jax.set_mesh(mesh):
        fed = jax.device_put(batches, NamedSharding(mesh, P(None, "channels")))
        stats = jax.device_put(fresh(8), over)
        new = recompute(lambda p, s, x: ema(s, x), 1.0, stats, fed)
    assert new["mean"].sharding == over
    assert_close(new, moments(whole(batches)))


def test_what_is_no_array_is_named():
    def fn(params, stats, x):
        return ema(stats, x)

    with pytest.raises(
        TypeError, match=r"batch_stats\['act'\] must be an array, got f"
    ):
        recompute(fn, 1.0, {**fresh(), "act": lambda x: x}, data())
    with pytest.raises(TypeError, match=r"params\['act'\] must be an array, got str"):
        recompute(fn, {"act": "tanh"}, fresh(), data())
