"""Statistics that are averaged along with the weights, against float64."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import swa_jax

from ..compiled import assert_in_place
from .transformations import METHODS, OPTIONS, Case, bits, trees

#: The default run takes two cases of each test here, see conftest.py.
pytestmark = pytest.mark.sample(2)

ALONG = [name for name in METHODS if name != "swag"]
PARAMS = {"w": jnp.linspace(-1, 1, 6).reshape(2, 3), "b": jnp.zeros(3)}
STATS = {"mean": jnp.zeros(3), "count": jnp.int32(0)}


def forward(params, stats):
    """Statistics that follow the weights, and a counter."""
    mean = 0.9 * stats["mean"] + 0.1 * params["w"].sum(0)
    return {"mean": mean, "count": stats["count"] + 1}


def make_step(tx):
    def step(params, stats, opt_state):
        stats = forward(params, stats)
        grads = jax.tree.map(jnp.cos, params)
        updates, opt_state = tx.update(grads, opt_state, params, batch_stats=stats)
        return optax.apply_updates(params, updates), stats, opt_state

    return step


def run(tx, steps, params=PARAMS, stats=STATS):
    """Weights and statistics after each step, and the last state."""
    step, history = jax.jit(make_step(tx)), []
    opt_state = jax.jit(tx.init)(params)
    for _ in range(steps):
        params, stats, opt_state = step(params, stats, opt_state)
        history.append({"params": params, "batch_stats": stats})
    return history, opt_state


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ALONG)
def test_both_are_averaged(name, options):
    case = Case(METHODS[name], options)
    tx = optax.chain(
        optax.sgd(0.1), swa_jax.with_batch_stats(case.make(), forward(PARAMS, STATS))
    )
    history, opt_state = run(tx, 6)
    case.assert_run(history[-1], opt_state, history)


@pytest.mark.parametrize("name", ALONG)
def test_the_weights_are_those_without_it_and_so_is_training(name):
    make = Case(METHODS[name]).make
    along = optax.chain(optax.sgd(0.1), swa_jax.with_batch_stats(make(), STATS))
    alone = optax.chain(optax.sgd(0.1), make())
    (history, state), (expected, without) = run(along, 4), run(alone, 4)
    assert bits(history) == bits(expected)
    both = swa_jax.averaged_params(state, history[-1])["params"]
    assert bits(both) == bits(swa_jax.averaged_params(without, history[-1]["params"]))


@pytest.mark.parametrize("name", ALONG)
def test_a_loop_gives_the_same_from_a_tree_of_both(name):
    average = Case(METHODS[name]).make()
    along = swa_jax.with_batch_stats(average, STATS)
    history, opt_state = run(optax.chain(optax.sgd(0.1), along), 4)
    for maker in (average, along):  # the wrapped one is an average like any other
        state = swa_jax.init_average(history[0], maker)
        for model in history:
            state = swa_jax.update_average(state, model, maker)
        got = swa_jax.averaged_params(state, history[-1])
        assert bits(got) == bits(swa_jax.averaged_params(opt_state, history[-1]))


@pytest.mark.parametrize("name", ALONG)
def test_step_is_in_place(name):
    # Statistics are a small part of a model: of them XLA may keep a copy.
    params = {"w": jnp.ones((512, 512)), "b": jnp.ones(7)}
    stats = {"mean": jnp.ones(512)}

    def step(params, stats, opt_state):
        stats = {"mean": jnp.sin(stats["mean"])}
        grads = jax.tree.map(jnp.sin, params)
        updates, opt_state = tx.update(grads, opt_state, params, batch_stats=stats)
        return optax.apply_updates(params, updates), stats, opt_state

    average = swa_jax.with_batch_stats(Case(METHODS[name]).make(), stats)
    tx = optax.chain(optax.sgd(0.1), average)
    carry = (params, stats, tx.init(params))
    compiled = jax.jit(step, donate_argnums=(0, 2)).lower(*carry).compile()
    assert_in_place(compiled, donated=carry[::2], average=trees(carry[2][-1]))


def test_nothing_of_the_given_statistics_is_kept():
    stats = jax.tree.map(jnp.copy, STATS)
    average = swa_jax.with_batch_stats(swa_jax.swa(), stats)
    jax.tree.map(lambda x: x.delete(), stats)
    state = average.init(PARAMS)
    assert state.avg_params["batch_stats"]["mean"].shape == (3,)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_statistics_stay_where_they_are(kind):
    mesh = jax.make_mesh((4,), ("model",), axis_types=(kind,))
    rows = NamedSharding(mesh, PartitionSpec("model"))
    params = jax.device_put(
        {"w": jnp.ones((2, 8)), "b": jnp.ones(8)}, rows.update(spec=PartitionSpec())
    )
    stats = {"mean": jax.device_put(jnp.zeros(8), rows)}
    average = swa_jax.with_batch_stats(swa_jax.ema(0.9), stats)
    state = average.init(params)
    assert state.avg_params["batch_stats"]["mean"].sharding == rows

    @jax.jit
    def update(state, stats):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return average.update(zeros, state, params, batch_stats=stats)[1]

    for value in (1.0, 4.0):
        stats = {"mean": jax.device_put(jnp.full(8, value), rows)}
        state = update(state, stats)
    mean = state.avg_params["batch_stats"]["mean"]
    assert mean.sharding.is_equivalent_to(rows, 1)
    expected = (0.9 * 0.1 * 1 + 0.1 * 4) / (1 - 0.9**2)
    np.testing.assert_allclose(mean, expected, rtol=1e-6)


def test_inside_multi_steps_the_statistics_of_the_last_mini_batch_enter():
    average = swa_jax.with_batch_stats(swa_jax.swa(), STATS)
    tx = optax.MultiSteps(optax.chain(optax.sgd(0.1), average), every_k_schedule=2)
    history, opt_state = run(tx, 6)
    got = swa_jax.swa_params(opt_state, history[-1])["batch_stats"]
    expected = np.mean([history[i]["batch_stats"]["mean"] for i in (1, 3, 5)], axis=0)
    np.testing.assert_allclose(got["mean"], expected, rtol=1e-6, atol=1e-7)
    assert got["count"] == 6


def test_a_vmapped_scan_over_seeds():
    average = swa_jax.with_batch_stats(swa_jax.ema(0.7), STATS)
    tx = optax.chain(optax.sgd(0.1), average)

    @jax.jit
    @jax.vmap
    def train(shift):
        params = jax.tree.map(lambda x: x + shift, PARAMS)
        carry = (params, STATS, tx.init(params))
        step = make_step(tx)
        carry, _ = jax.lax.scan(lambda c, _: (step(*c), None), carry, length=3)
        params, stats, opt_state = carry
        return swa_jax.averaged_params(
            opt_state, {"params": params, "batch_stats": stats}
        )

    got = train(jnp.array([0.0, 0.5]))
    alone = [
        run(tx, 3, jax.tree.map(lambda x, shift=shift: x + shift, PARAMS))[0]
        for shift in (0.0, 0.5)
    ]
    expected = jax.tree.map(
        lambda *x: np.stack(x), *map(Case(METHODS["ema"]).expected, alone)
    )
    check = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(check, got, expected)


def test_linen_batch_norm():
    net = nn.BatchNorm(momentum=0.5)
    batches = np.random.default_rng(0).normal(3, 2, (4, 32, 5)).astype(np.float32)
    variables = net.init(jax.random.key(0), batches[0], use_running_average=False)
    params, stats = variables["params"], variables["batch_stats"]
    tx = optax.chain(
        optax.sgd(0.1), swa_jax.with_batch_stats(swa_jax.swa(start_step=2), stats)
    )
    opt_state = tx.init(params)
    running, seen = np.zeros(5), []
    for batch in batches:
        _, new = net.apply(
            {"params": params, "batch_stats": stats},
            batch,
            use_running_average=False,
            mutable=["batch_stats"],
        )
        stats = new["batch_stats"]
        updates, opt_state = tx.update(params, opt_state, params, batch_stats=stats)
        params = optax.apply_updates(params, updates)
        running = 0.5 * running + 0.5 * batch.mean(0, dtype=np.float64)
        seen.append(running)
    averaged = swa_jax.swa_params(opt_state, {"params": params, "batch_stats": stats})
    got = averaged["batch_stats"]["mean"]
    np.testing.assert_allclose(got, np.mean(seen[1:], axis=0), rtol=1e-5)
    net.apply(averaged, batches[0], use_running_average=True)  # a network's, as it is


def test_nnx_optimizer_hands_the_statistics_on():
    class Net(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(2, momentum=0.5, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.norm(self.linear(x))

    model = Net()
    average = swa_jax.with_batch_stats(swa_jax.swa(), nnx.state(model, nnx.BatchStat))
    tx = optax.chain(optax.sgd(0.1), average)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        grads = nnx.grad(lambda model: (model(x) ** 3).mean())(model)
        stats = nnx.state(model, nnx.BatchStat)
        optimizer.update(model, grads, batch_stats=stats)

    x = np.random.default_rng(0).normal(1, 2, (16, 3)).astype(np.float32)
    seen = []
    for _ in range(3):
        step(model, optimizer, x)
        seen.append(np.asarray(model.norm.mean[...], np.float64))
    variables = {
        "params": nnx.state(model, nnx.Param),
        "batch_stats": nnx.state(model, nnx.BatchStat),
    }
    averaged = swa_jax.swa_params(optimizer.opt_state, variables)
    nnx.update(model, averaged["params"], averaged["batch_stats"])
    np.testing.assert_allclose(model.norm.mean[...], np.mean(seen, 0), rtol=1e-5)


# What a user may do wrong.


def test_update_without_statistics():
    average = swa_jax.with_batch_stats(swa_jax.ema(0.9), STATS)
    tx = optax.chain(optax.sgd(0.1), average)
    with pytest.raises(TypeError, match=r"with_batch_stats\(ema\(\)\).*no batch_stats"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_update_without_params():
    average = swa_jax.with_batch_stats(swa_jax.swa(), STATS)
    with pytest.raises(ValueError, match="params=None"):
        average.update(PARAMS, average.init(PARAMS), batch_stats=STATS)


@pytest.mark.parametrize(
    "wrong",
    [{"mean": jnp.zeros(3)}, STATS | {"mean": jnp.zeros(4)}, {"batch_stats": STATS}],
    ids=["missing", "shape", "nested"],
)
def test_other_statistics_than_at_first(wrong):
    average = swa_jax.with_batch_stats(swa_jax.swa(), STATS)
    with pytest.raises(ValueError, match="batch_stats"):
        average.update(PARAMS, average.init(PARAMS), PARAMS, batch_stats=wrong)


def test_reading_with_the_parameters_alone():
    average = swa_jax.with_batch_stats(swa_jax.swa(), STATS)
    with pytest.raises(ValueError, match="pass the tree of both"):
        swa_jax.swa_params(average.init(PARAMS), PARAMS)


def test_what_cannot_be_averaged_along():
    with pytest.raises(ValueError, match=r"swag\(\).*Fix: swa_jax.recompute"):
        swa_jax.with_batch_stats(swa_jax.swag(), STATS)
    with pytest.raises(TypeError, match="one of swa_jax's transformations"):
        swa_jax.with_batch_stats(optax.sgd(0.1), STATS)
    with pytest.raises(TypeError, match=r"with_batch_stats: batch_stats\['f'\] is a"):
        swa_jax.with_batch_stats(swa_jax.swa(), {"f": "mean"})
