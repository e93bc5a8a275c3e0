"""The BatchNorm pass against float64 statistics of the data it is given.

Tolerance: a model's own statistic is a float32 mean of n values (error about
log2(n) * 2**-24 of its magnitude in XLA's tree sums, Flax's E[x^2] - E[x]^2 included,
as long as mean^2 and variance are of one size), and the pass adds a division and two
roundings a batch. 2e-5 relative leaves a factor of about ten.
"""

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import swa_jax
from swa_jax.batch_stats._pass import _Pass
from swa_jax.typing import Mode

RTOL = 2e-5
MODES: tuple[Mode, ...] = ("pooled", "sample_weighted", "equal_weighted")


class Net(nn.Module):
    """Two normalised layers and a head that statistics do not need."""

    momentum: float = 0.9
    classes: int = 10
    axis_name: str | None = None
    frozen_first: bool = False

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(
            nn.BatchNorm, momentum=self.momentum, axis_name=self.axis_name
        )
        x = nn.Dense(8)(x)
        x = nn.relu(norm(use_running_average=self.frozen_first or not train)(x))
        x = nn.Dense(6)(x)
        x = nn.relu(norm(use_running_average=not train)(x))
        return nn.Dense(self.classes, name="head")(x)


def linen(net, example):
    variables = net.init(jax.random.key(0), example, train=False)

    def batch_stats_fn(params, batch_stats, batch):
        _, updated = net.apply(
            {"params": params, "batch_stats": batch_stats},
            batch["x"],
            train=True,
            mutable=["batch_stats"],
        )
        return updated["batch_stats"]

    return batch_stats_fn, variables["params"], variables["batch_stats"]


def data(sizes, features=5, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    shift = rng.normal(size=features)
    return [
        {"x": (scale * (rng.normal(size=(n, features)) + shift)).astype(np.float32)}
        for n in sizes
    ]


def oracle(params, batches, mode):
    """The statistics of ``Net`` in float64, batch by batch through the network."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    per_batch = []
    for batch in batches:
        x, found = np.asarray(batch["x"], np.float64), {}
        for layer in ("0", "1"):
            dense, norm = params[f"Dense_{layer}"], params[f"BatchNorm_{layer}"]
            x = x @ dense["kernel"] + dense["bias"]
            mean, var = x.mean(0), x.var(0)
            found[f"BatchNorm_{layer}"] = {"mean": mean, "var": var}
            x = (x - mean) / np.sqrt(var + 1e-5) * norm["scale"] + norm["bias"]
            x = np.maximum(x, 0)
        per_batch.append(found)
    return combine(per_batch, [len(b["x"]) for b in batches], mode)


def combine(per_batch, sizes, mode):
    weights = np.ones(len(sizes)) if mode == "equal_weighted" else np.array(sizes)
    weights = weights / weights.sum()

    def mix(*values):
        return sum(w * v for w, v in zip(weights, values, strict=True))

    mixed = jax.tree.map(mix, *per_batch)
    if mode == "pooled":
        for name, stats in mixed.items():
            centre = stats["mean"]
            spread = [(found[name]["mean"] - centre) ** 2 for found in per_batch]
            stats["var"] = stats["var"] + mix(*spread)
    return mixed


def affine_model(params, batch_stats, batch):
    """One statistic, momentum 0.9, no framework."""
    x = params * batch
    return {
        "mean": 0.9 * batch_stats["mean"] + 0.1 * x.mean(),
        "var": 0.9 * batch_stats["var"] + 0.1 * x.var(),
    }


SCALARS = {"mean": jnp.float32(3.0), "var": jnp.float32(2.0)}


@pytest.mark.parametrize(
    ("mode", "mean", "var"),
    [
        ("pooled", 5.0, 80 / 3),
        ("sample_weighted", 5.0, 6.5 / 3),
        ("equal_weighted", 6.75, 2.625),
    ],
)
def test_worked_example_of_the_three_modes(mode, mean, var):
    batches = [jnp.array([0.0, 1.0, 2.0, 3.0]), jnp.array([10.0, 14.0])]
    stats = swa_jax.recompute_batch_stats(
        affine_model, jnp.float32(1.0), SCALARS, iter(batches), mode=mode
    )
    np.testing.assert_allclose(stats["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(stats["var"], var, rtol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.99])
def test_linen_network_with_a_ragged_last_batch(momentum):
    batches = data([32, 32, 32, 7])
    fn, params, stats = linen(Net(momentum), batches[0]["x"])
    for mode in MODES:
        new = swa_jax.recompute_batch_stats(fn, params, stats, batches, mode=mode)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, stats)
        want = oracle(params, batches, mode)
        chex.assert_trees_all_close(new, want, rtol=RTOL, atol=RTOL)


def test_pooled_statistics_are_those_of_the_whole_data_set():
    """A layer on raw inputs cannot tell how the data were cut into batches."""
    batches = data([50, 50, 50, 13], seed=3)
    whole = np.concatenate([b["x"] for b in batches]).astype(np.float64)
    fn, params, stats = linen(Net(), batches[0]["x"])
    new = swa_jax.recompute_batch_stats(fn, params, stats, batches)["BatchNorm_0"]
    x = whole @ np.float64(params["Dense_0"]["kernel"])  # its bias starts at 0
    np.testing.assert_allclose(new["mean"], x.mean(0), rtol=RTOL, atol=RTOL)
    np.testing.assert_allclose(new["var"], x.var(0), rtol=RTOL)


def one_layer(factors, batch_stats, batch):
    """Momentum comes with the parameters, so one compilation serves all examples."""
    moments = {"mean": batch["x"].mean(0), "var": batch["x"].var(0)}
    return {
        "layer": jax.tree.map(
            lambda old, new: factors["old"] * old + factors["new"] * new,
            batch_stats["layer"],
            moments,
        )
    }


@settings(deadline=None, max_examples=60)
@given(
    momentum=st.floats(0, 0.996, allow_subnormal=False),
    magnitude=st.integers(-6, 6),
    sizes=st.lists(st.sampled_from([1, 2, 5]), min_size=1, max_size=5),
    mode=st.sampled_from(MODES),
)
def test_any_momentum_and_any_scale_of_data(momentum, magnitude, sizes, mode):
    """A momentum that is no short decimal is known to float32's spacing, 2**-24.

    Dividing by 1 - a then costs 2**-24 / (1 - a), which is allowed for here. Above
    0.997 that is more than the promised 1e-5, and is refused.
    """

    batches = data(sizes, features=3, seed=sum(sizes), scale=10.0**magnitude)
    stats = {"layer": {"mean": jnp.ones(3), "var": jnp.ones(3)}}
    factors = {"old": np.float32(momentum), "new": np.float32(1 - momentum)}
    new = swa_jax.recompute_batch_stats(one_layer, factors, stats, batches, mode=mode)
    found = [
        {"layer": {"mean": x.mean(0), "var": x.var(0)}}
        for x in (np.float64(b["x"]) for b in batches)
    ]
    want = combine(found, sizes, mode)["layer"]
    rtol = 1e-6 + 2.0**-23 / (1 - momentum)
    for key, unit in (("mean", 10.0**magnitude), ("var", 100.0**magnitude)):
        np.testing.assert_allclose(
            new["layer"][key], want[key], rtol=5 * rtol, atol=5e-6 * unit
        )


def test_short_decimal_momenta_are_recovered_exactly():
    """Momentum 0.99 in float32, 1 - a taken in float32, would be off by 9.5e-7."""
    for momentum in (0.9, 0.99, 0.999, 0.9999):

        def fn(params, stats, batch, momentum=momentum):
            return {"x": momentum * stats["x"] + (1 - momentum) * batch.mean(0)}

        value = np.array([1e3, 1.7e6, 3e-5], np.float32)
        new = swa_jax.recompute_batch_stats(
            fn, {}, {"x": jnp.zeros(3)}, [jnp.asarray(value)[None]]
        )
        # Two roundings, of z = (1 - a) * x and of z / (1 - a), and 1 - a itself.
        np.testing.assert_allclose(new["x"], value, rtol=3 * 2.0**-24)


def test_many_small_batches_do_not_drift():
    """3,000 batches: rounding errors of a running mean must not pile up."""
    rng = np.random.default_rng(5)
    batches = (100 + rng.normal(size=(3000, 2))).astype(np.float32)
    new = swa_jax.recompute_batch_stats(
        affine_model, jnp.float32(1.0), SCALARS, iter(batches)
    )
    whole = batches.astype(np.float64).ravel()
    np.testing.assert_allclose(new["mean"], whole.mean(), rtol=1e-6)
    np.testing.assert_allclose(new["var"], whole.var(), rtol=1e-4)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(5, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.95, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(nnx.relu(self.norm(self.dense(x)))))


def test_nnx_network():
    batches = data([16, 16, 5], seed=1)
    model = NnxNet(nnx.Rngs(0))
    model.train()
    parts: Any = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    graphdef, params, stats, rest = parts

    def batch_stats_fn(params, batch_stats, batch):
        model = nnx.merge(graphdef, params, batch_stats, rest, copy=True)
        model(batch["x"])
        return nnx.state(model, nnx.BatchStat)

    new = swa_jax.recompute_batch_stats(batch_stats_fn, params, stats, batches)
    whole = np.concatenate([b["x"] for b in batches]).astype(np.float64)
    x = whole @ np.float64(model.dense.kernel[...])
    nnx.update(model, new)  # the result fits the model it came from
    np.testing.assert_allclose(model.norm.mean[...], x.mean(0), rtol=RTOL, atol=RTOL)
    np.testing.assert_allclose(model.norm.var[...], x.var(0), rtol=RTOL)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_batches_give_the_global_statistics(axis_type):
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(axis_type,))
    batches = data([32, 32, 16], seed=2)
    fn, params, stats = linen(Net(), batches[0]["x"])
    want = oracle(params, batches, "pooled")
    params, stats = jax.device_put((params, stats), NamedSharding(mesh, P()))
    batches = jax.device_put(batches, NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else mesh:
        new = swa_jax.recompute_batch_stats(fn, params, stats, batches)
    chex.assert_trees_all_close(new, want, rtol=RTOL, atol=RTOL)


@pytest.mark.parametrize("synchronised", [False, True])
def test_under_pmap_every_device_has_the_exact_statistics(synchronised):
    batches = data([64, 64, 24], seed=4)
    net = Net(axis_name="devices" if synchronised else None)
    fn, params, stats = linen(Net(), batches[0]["x"])
    if synchronised:
        fn, *_ = linen_apply_only(net)
    split = [{"x": b["x"].reshape(8, -1, 5)} for b in batches]
    spread = functools.partial(jax.tree.map, lambda x: jnp.stack([x] * 8))
    new = swa_jax.recompute_batch_stats(
        fn, spread(params), spread(stats), split, axis_name="devices"
    )
    for device in range(8):
        chex.assert_trees_all_equal(
            jax.tree.map(lambda x, d=device: x[d], new),
            jax.tree.map(lambda x: x[0], new),
        )
    first = jax.tree.map(lambda x: x[0], new)
    # Synchronised layers see whole batches; others see each device's part as one.
    seen = batches if synchronised else [{"x": x} for b in split for x in b["x"]]
    want = oracle(params, seen, "pooled")
    chex.assert_trees_all_close(first, want, rtol=RTOL, atol=RTOL)
    chex.assert_trees_all_close(
        first["BatchNorm_0"],
        oracle(params, batches, "pooled")["BatchNorm_0"],
        rtol=RTOL,
        atol=RTOL,
    )


def linen_apply_only(net):
    def batch_stats_fn(params, batch_stats, batch):
        variables = {"params": params, "batch_stats": batch_stats}
        _, updated = net.apply(variables, batch["x"], True, mutable=["batch_stats"])
        return updated["batch_stats"]

    return (batch_stats_fn,)


def test_a_frozen_layer_keeps_its_statistics_and_is_run_with_them():
    batches = data([16, 16], seed=6)
    net = Net(frozen_first=True)
    fn, params, stats = linen(net, batches[0]["x"])
    stats["BatchNorm_0"] = {"mean": jnp.full(8, 0.5), "var": jnp.full(8, 4.0)}
    with pytest.warns(UserWarning, match="'BatchNorm_0/mean', 'BatchNorm_0/var'"):
        new = swa_jax.recompute_batch_stats(fn, params, stats, batches)
    chex.assert_trees_all_equal(new["BatchNorm_0"], stats["BatchNorm_0"])
    whole = np.concatenate([b["x"] for b in batches]).astype(np.float64)
    x = whole @ np.float64(params["Dense_0"]["kernel"])
    x = np.maximum((x - 0.5) / np.sqrt(4 + 1e-5), 0)
    x = x @ np.float64(params["Dense_1"]["kernel"])
    np.testing.assert_allclose(new["BatchNorm_1"]["mean"], x.mean(0), atol=RTOL)
    np.testing.assert_allclose(new["BatchNorm_1"]["var"], x.var(0), rtol=RTOL)


def test_counters_and_leaves_without_a_partner():
    def fn(params, stats, batch):
        return {
            "steps": stats["steps"] + 1,
            "norm": 0.5 * stats["norm"] + 0.5 * jnp.square(batch).mean(),
            "var": 0.5 * stats["var"] + 0.5 * batch.var(),
            "untouched": stats["untouched"],
        }

    stats = {
        "steps": jnp.int32(7),
        "norm": jnp.float32(1),
        "var": jnp.float32(1),
        "untouched": jnp.arange(3),
    }
    batches = [jnp.array([1.0, 3.0, 5.0]), jnp.array([7.0])]
    with pytest.warns(UserWarning, match=r"'pooled' found no mean.*'norm', 'var'"):
        new = swa_jax.recompute_batch_stats(fn, {}, stats, batches)
    assert new["steps"] == 9
    np.testing.assert_array_equal(new["untouched"], [0, 1, 2])
    np.testing.assert_allclose(new["norm"], (1 + 9 + 25 + 49) / 4, rtol=1e-6)
    # No mean beside it: averaged by size, without the spread between batches.
    np.testing.assert_allclose(new["var"], (3 * 8 / 3 + 0) / 4, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_statistics(dtype):
    def fn(params, stats, batch):
        new = batch.mean(0).astype(dtype)
        return {"mean": dtype(0.9) * stats["mean"] + dtype(0.1) * new}

    batches = [jnp.full((4, 2), value, dtype) for value in (1.0, 2.0, 4.0)]
    stats = {"mean": jnp.zeros(2, dtype)}
    new = swa_jax.recompute_batch_stats(fn, {}, stats, batches)
    assert new["mean"].dtype == dtype
    # 0.1 and each product are rounded to the dtype, the result once more.
    rtol = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.float32(new["mean"]), 7 / 3, rtol=rtol)


def test_float64_statistics(enable_x64):
    batches = [b["x"].astype(np.float64) for b in data([9, 4], seed=8)]

    def fn(params, stats, batch):
        return {"mean": 0.99 * stats["mean"] + (1 - 0.99) * batch.mean(0)}

    new = swa_jax.recompute_batch_stats(fn, {}, {"mean": jnp.zeros(5)}, batches)
    want = np.concatenate(batches).mean(0)
    assert new["mean"].dtype == np.float64
    np.testing.assert_allclose(new["mean"], want, rtol=1e-9)


def flops(compiled):
    cost = compiled.cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)["flops"]


def test_costs_one_forward_pass_without_the_head():
    """The compiled computation itself says what is run: all old values at once."""
    batch = data([64])[0]
    classes = 977  # a number that occurs nowhere else
    net = Net(classes=classes)
    fn, params, stats = linen(net, batch["x"])
    run = _Pass(fn, params, stats, None, None)
    run._begin(batch)
    assert run.layout.merged
    program: Any = run.program.run  # under jax.jit
    many, one = (
        program.lower(
            layout, params, run.leaves, run.device_sizes, None, batch
        ).compile()
        for layout in (run.layout, run.layout._replace(full=False))
    )

    def whole(params, stats, batch):
        variables = {"params": params, "batch_stats": stats}
        return net.apply(variables, batch["x"], train=True, mutable=["batch_stats"])

    everything = jax.jit(whole).lower(params, stats, batch).compile()
    # The head is there to be found, and gone where it should be.
    assert f"f32[64,{classes}]" in (everything.as_text() or "")
    assert f"f32[64,{classes}]" not in many.as_text()
    # Seven old values more are elementwise work on 28 statistics.
    old_values = run.judge.rows.shape[1] - 1
    assert flops(many) - flops(one) < 20 * old_values * run.judge.rows.shape[-1]
    assert flops(many) < flops(everything)


def test_runs_the_model_once_a_batch_and_compiles_once_a_shape():
    runs, traces = [], []

    def fn(params, stats, batch):
        traces.append(batch.shape)
        jax.debug.callback(lambda: runs.append(1), ordered=False)
        return {"mean": 0.9 * stats["mean"] + 0.1 * batch.mean()}

    def recompute(sizes):
        batches = [jnp.full(n, float(n)) for n in sizes]
        stats = {"mean": jnp.zeros(())}
        return swa_jax.recompute_batch_stats(fn, {}, stats, batches)["mean"]

    np.testing.assert_allclose(recompute([4, 4, 4, 2]), 52 / 14, rtol=1e-6)
    jax.effects_barrier()
    assert len(runs) == 4 + 1  # the first batch twice
    assert traces == [(4,), (2,)]
    recompute([4, 4, 4, 2])
    recompute([4, 2, 2])
    assert len(traces) == 2  # nothing was traced again


def test_inputs_are_left_untouched_and_batches_read_one_by_one():
    batches = data([8, 8, 8])
    fn, params, stats = linen(Net(), batches[0]["x"])
    before = jax.tree.map(np.array, (params, stats, batches))
    asked = []

    def stream():
        for number, batch in enumerate(batches):
            asked.append(number)
            yield batch

    first = swa_jax.recompute_batch_stats(fn, params, stats, stream())
    assert asked == [0, 1, 2]
    again = swa_jax.recompute_batch_stats(fn, params, stats, batches)
    chex.assert_trees_all_equal((params, stats, batches), before)
    chex.assert_trees_all_equal(first, again)
    # The old values have no influence.
    other = jax.tree.map(lambda x: x + 5, stats)
    third = swa_jax.recompute_batch_stats(fn, params, other, batches)
    chex.assert_trees_all_equal(first, third)


def test_without_normalisation_there_is_nothing_to_do():
    def never(*args):
        raise AssertionError

    unread: Any = never
    assert swa_jax.recompute_batch_stats(never, {}, {}, unread) == {}


def unhashable_model():
    class Model:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, params, stats, batch):
            return affine_model(params, stats, batch)

    return Model()


def test_a_model_need_not_be_hashable():
    new = swa_jax.recompute_batch_stats(
        unhashable_model(), jnp.float32(2), SCALARS, [jnp.arange(4.0)]
    )
    np.testing.assert_allclose(new["mean"], 3.0, rtol=1e-6)


def recompute_with(fn, batches=((1.0, 2.0, 4.0),), **options):
    batches = (x if isinstance(x, dict) else np.float32(x) for x in batches)
    return swa_jax.recompute_batch_stats(
        fn, jnp.float32(1), SCALARS, batches, **options
    )


def replaced(**changes):
    def fn(params, stats, batch):
        changed = {k: f(stats[k], params * batch) for k, f in changes.items()}
        return affine_model(params, stats, batch) | changed

    return fn


NOT_AVERAGES = {
    "sum": lambda old, x: old + x.mean(),
    "maximum": lambda old, x: jnp.maximum(old, x.max()),
    "square": lambda old, x: 0.9 * old**2 + 0.1 * x.mean(),
    "root": lambda old, x: 0.9 * jnp.sqrt(jnp.abs(old)) + 0.1 * x.mean(),
    "growing": lambda old, x: 1.1 * old + x.mean(),
    "negative": lambda old, x: -0.5 * old + x.mean(),
    "clipped": lambda old, x: jnp.minimum(0.9 * old, 1e4) + 0.1 * x.mean(),
}


@pytest.mark.parametrize("name", NOT_AVERAGES)
def test_a_leaf_that_is_no_running_average_is_named(name):
    with pytest.raises(ValueError, match=r"\['var'\] is not a running average"):
        recompute_with(replaced(var=NOT_AVERAGES[name]))


BAD = {
    "no batches": (
        lambda: recompute_with(affine_model, batches=[]),
        "batches is empty.*at least one batch",
    ),
    "mode": (
        lambda: recompute_with(affine_model, mode="mean"),
        "mode must be one of 'pooled', 'sample_weighted', 'equal_weighted', got 'mean'",
    ),
    "evaluation mode": (
        lambda: recompute_with(lambda params, stats, batch: stats),
        "returned batch_stats unchanged.*training mode",
    ),
    "wrapped": (
        lambda: recompute_with(lambda p, s, b: {"batch_stats": affine_model(p, s, b)}),
        r"leaf \['batch_stats'\]\['mean'\] is not expected.*updated\['batch_stats'\]",
    ),
    "missing": (
        lambda: recompute_with(lambda p, s, b: {"mean": affine_model(p, s, b)["mean"]}),
        r"leaf \['var'\] is missing",
    ),
    "shape": (
        lambda: recompute_with(replaced(mean=lambda old, x: 0.9 * old + 0.1 * x)),
        r"leaf \['mean'\] has shape \(3,\).*expected \(\)",
    ),
    "not finite": (
        lambda: recompute_with(affine_model, batches=[[1, np.nan]]),
        r"\['(mean|var)'\] is not finite after the first batch",
    ),
    "no array": (
        lambda: recompute_with(affine_model, batches=[{"x": 3.0}]),
        r"a batch must hold an array whose axis 0 counts.*\{'x': \(\)\}",
    ),
    "no examples": (
        lambda: recompute_with(affine_model, batches=[np.zeros((0, 3))]),
        r"at least one example, got an array of shape \(0, 3\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_value_error_that_says_what_to_do(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
    # Nothing was lost.
    np.testing.assert_array_equal([SCALARS["mean"], SCALARS["var"]], [3.0, 2.0])


def test_batches_alone_are_stacked_for_the_devices_of_a_mapped_axis():
    """A model that synchronises along an axis, and parameters that are not stacked."""
    rng = np.random.default_rng(0)
    batches = [
        rng.normal(i, 2, (4, n, 3)).astype(np.float32) for i, n in ((1, 8), (3, 5))
    ]

    def forward(params, batch_stats, x):
        mean = jax.lax.pmean((params * x).mean(0), "batch")
        square = jax.lax.pmean(((params * x) ** 2).mean(0), "batch")
        new = {"mean": mean, "var": square - mean**2}
        return jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, batch_stats, new)

    stats = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"wrap the function in jax.vmap\(batch_st"):
        swa_jax.recompute_batch_stats(forward, jnp.ones(()), stats, batches)
    mapped = jax.vmap(forward, (None, None, 0), None, axis_name="batch")
    found = swa_jax.recompute_batch_stats(
        mapped,
        jnp.full((), 2.0),
        stats,
        batches,
        batch_weight=lambda x: x.shape[0] * x.shape[1],
    )
    every = 2 * np.concatenate([x.reshape(-1, 3) for x in batches]).astype(np.float64)
    np.testing.assert_allclose(found["mean"], every.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["var"], every.var(0), rtol=1e-5)
