"""What the peers' own acceptance tests assert, asserted of swa_jax.

Written afresh from what they check: PyTorch 2.13, `test/optim/test_swa_utils.py`
(`TestSWAUtils`) and the SWALR cases of `test/optim/test_lrscheduler.py`; Lightning,
`tests/tests_pytorch/callbacks/test_stochastic_weight_avg.py` and
`test_weight_averaging.py`. Recorded numbers of PyTorch itself are in `test_parity.py`.
"""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import swa_jax

#: The default run takes two cases of each test here, see conftest.py.
pytestmark = pytest.mark.sample(2)

U = 2.0**-24  # float32's unit roundoff


class Dense(nn.Module):
    """Two dense layers, with BatchNorm in between or not."""

    norm: bool = False
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Dense(5)(x.reshape(len(x), -1))
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train, momentum=self.momentum)(x)
        return nn.Dense(3)(nn.relu(x))


class Convolutional(nn.Module):
    """A convolution with BatchNorm over its channels, and a head."""

    norm: bool = True
    momentum: float = 0.7

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(4, (3, 3), use_bias=False)(x)
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train, momentum=self.momentum)(x)
        return nn.Dense(3)(jnp.mean(nn.relu(x), axis=(1, 2)))


NETWORKS = {"dense": Dense(), "dense+bn": Dense(True), "conv+bn": Convolutional()}


def images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(2, 3, (n, 6, 6, 2)).astype(np.float32)


def perturbed(params: Any, count: int) -> list[Any]:
    """Random walks of the weights, as PyTorch's tests make them."""
    rng = np.random.default_rng(1)
    walk = [params]
    for _ in range(count):
        walk.append(
            jax.tree.map(
                lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), walk[-1]
            )
        )
    return walk[1:]


def assert_analytic_mean(average: Any, models: list[Any]) -> None:
    def check(got: Any, *leaves: Any) -> None:
        stacked = np.stack(leaves)
        # A running mean rounds three times a model, at the weights' own scale.
        atol = 3 * len(leaves) * U * np.abs(stacked).max()
        np.testing.assert_allclose(
            got, stacked.mean(0, dtype=np.float64), rtol=0, atol=atol
        )

    jax.tree.map(check, average, *models)


# PyTorch: TestSWAUtils.


@pytest.mark.parametrize("name", NETWORKS)
def test_averages_equal_the_analytic_mean(name):
    """test_averaged_model_all_devices, test_averaged_model_mixed_device."""
    params = NETWORKS[name].init(jax.random.key(0), images(2))["params"]
    models = perturbed(params, 10)
    # PyTorch also averages a model with parts on two devices. One compiled step of JAX
    # wants all its arrays on the same ones: another device, or several, for all.
    mesh = jax.make_mesh((4,), ("data",))
    for where in (jax.devices()[3], jax.NamedSharding(mesh, jax.P())):
        average = swa_jax.init_average(jax.device_put(params, where))
        for model in models:
            average = swa_jax.update_average(average, jax.device_put(model, where))
        assert_analytic_mean(average.avg_params, models)
        assert average.num_averaged == 10
        expected = jax.device_put(0, where).sharding
        for leaf in jax.tree.leaves(average.avg_params):
            assert leaf.sharding.is_equivalent_to(expected, leaf.ndim)


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "msgpack"])
def test_state_round_trips(how):
    """test_averaged_model_state_dict, test_averaged_model_pickle: and goes on."""
    params = Dense().init(jax.random.key(0), images(2))["params"]
    models = perturbed(params, 6)
    average = swa_jax.init_average(params)
    for model in models[:4]:
        average = swa_jax.update_average(average, model)
    if how == "pickle":
        restored = pickle.loads(pickle.dumps(average))
    elif how == "deepcopy":
        restored = copy.deepcopy(average)
    else:
        template = swa_jax.init_average(params)
        data = flax.serialization.to_bytes(average)
        restored = flax.serialization.from_bytes(template, data)
    chex.assert_trees_all_equal(restored, average)
    for model in models[4:]:
        average = swa_jax.update_average(average, model)
        restored = swa_jax.update_average(restored, model)
    chex.assert_trees_all_equal(restored, average)
    assert_analytic_mean(restored.avg_params, models)


def test_exponential_average():
    """test_averaged_model_exponential: here it is optax's, not ours."""
    params = Dense().init(jax.random.key(0), images(2))["params"]
    models = perturbed(params, 10)
    average = models[0]
    for model in models[1:]:
        average = optax.incremental_update(model, average, step_size=0.1)
    weights = np.array([0.9**9, *(0.1 * 0.9 ** (9 - k) for k in range(1, 10))])

    def check(got: Any, *leaves: Any) -> None:
        expected = np.tensordot(weights, np.stack(leaves).astype(np.float64), 1)
        scale = np.abs(np.stack(leaves)).max()
        np.testing.assert_allclose(got, expected, rtol=0, atol=30 * U * scale)

    jax.tree.map(check, average, *models)


@pytest.mark.parametrize("kind", ["array", "dict", "tuple"])
@pytest.mark.parametrize("name", ["dense+bn", "conv+bn"])
def test_statistics_after_update_bn(name, kind):
    """test_update_bn_dnn and test_update_bn_cnn: labelled batches and bare ones.

    The network normalises by exactly the mean and variance of what enters its norm
    layer over the whole data, and momentum, mode and arguments stay as they were:
    nothing to restore, because nothing is changed.
    """
    network = NETWORKS[name]
    x = images(70)
    variables = network.init(jax.random.key(3), x[:2])
    params, batch_stats = variables["params"], variables["batch_stats"]
    wrap, unwrap = {
        "array": (lambda x: x, lambda b: b),
        "dict": (
            lambda x: {"image": x, "label": np.zeros(len(x))},
            lambda b: b["image"],
        ),
        "tuple": (lambda x: (x, np.zeros(len(x))), lambda b: b[0]),
    }[kind]

    def batch_stats_fn(params: Any, batch_stats: Any, batch: Any) -> Any:
        _, updated = network.apply(
            {"params": params, "batch_stats": batch_stats},
            unwrap(batch),
            train=True,
            mutable=["batch_stats"],
        )
        return updated["batch_stats"]

    before = jax.tree.map(np.array, (params, batch_stats))
    batches = [wrap(x[i : i + 20]) for i in range(0, 70, 20)]  # the last has 10
    stats = swa_jax.recompute_batch_stats(batch_stats_fn, params, batch_stats, batches)
    # Untouched, including statistics that had been trained.
    chex.assert_trees_all_equal((params, batch_stats), before)

    captured = network.apply(
        variables, x, capture_intermediates=True, mutable=["intermediates"]
    )[1]["intermediates"]
    layer = "Conv_0" if "conv" in name else "Dense_0"
    inputs = np.asarray(captured[layer]["__call__"][0], np.float64)
    inputs = inputs.reshape(-1, inputs.shape[-1])
    # Flax takes the variance of a batch as E[x^2] - E[x]^2: some hundred roundings at
    # the scale of E[x^2].
    square = (inputs**2).mean(0).max()
    norm = stats["BatchNorm_0"]
    np.testing.assert_allclose(
        norm["mean"], inputs.mean(0), atol=64 * U * square**0.5, rtol=0
    )
    np.testing.assert_allclose(
        norm["var"], inputs.var(0), atol=256 * U * square, rtol=0
    )


# PyTorch: SWALR in test_lrscheduler.py.


@pytest.mark.parametrize("strategy", ["linear", "cos"])
@pytest.mark.parametrize("anneal", [1, 5, 10])
def test_anneal_after_a_multiplicative_schedule(strategy, anneal):
    """test_swalr_hypers and the closed form: two groups, per-group rates."""
    epochs, start = 20, 7
    for initial, swa_lr in ((0.1, 0.05), (0.5, 1.0)):
        base = lambda epoch: initial * 0.9**epoch  # noqa: B023, E731
        schedule = swa_jax.swa_schedule(base, swa_lr, start, anneal, strategy=strategy)
        expected = []
        for epoch in range(epochs):
            x = min(1.0, max(0, epoch - start) / anneal)
            alpha = x if strategy == "linear" else (1 - np.cos(np.pi * x)) / 2
            lr0 = initial * 0.9**start
            after = lr0 + (swa_lr - lr0) * alpha
            expected.append(initial * 0.9**epoch if epoch < start else after)
        rates = [schedule(epoch) for epoch in range(epochs)]
        # The power, of up to 19 factors, may be off by some roundings.
        np.testing.assert_allclose(rates, expected, rtol=32 * U)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"strategy": "exponential"}, ValueError, "strategy must be one of"),
        ({"anneal_steps": -1}, ValueError, "anneal_steps must be at least 0"),
        ({"anneal_steps": 1.5}, TypeError, "anneal_steps must be an integer"),
    ],
)
def test_rejected_hyperparameters(options, error, message):
    """What SWALR refuses: an unknown strategy, a negative or fractional length."""
    with pytest.raises(error, match=message):
        swa_jax.swa_schedule(
            0.1, **{"swa_lr": 0.05, "start_step": 5, "anneal_steps": 9} | options
        )


# Lightning.


def train(
    tx: Any, state: tuple[Any, Any, Any], batches: list[np.ndarray]
) -> tuple[Any, Any, Any]:
    """Goes on with a network with BatchNorm over some batches."""
    network = Dense(norm=True)

    @jax.jit
    def step(state: Any, x: jax.Array) -> Any:
        params, batch_stats, opt_state = state

        def loss(params: Any) -> Any:
            y, updated = network.apply(
                {"params": params, "batch_stats": batch_stats},
                x,
                train=True,
                mutable=["batch_stats"],
            )
            return jnp.mean(y**2), updated["batch_stats"]

        grads, batch_stats = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), batch_stats, opt_state

    for x in batches:
        state = step(state, x)
    return state


@pytest.mark.parametrize("crash_epoch", [1, 4, 5, 7])
def test_resumed_training_ends_with_the_same_bits(crash_epoch):
    """test_swa_resume_training_from_checkpoint asks for closeness; this is exact.

    Eight epochs of three steps, averaged from the fifth on; stopped before, at the
    start of, and during averaging, and continued from what was saved.
    """
    recipe = swa_jax.SWA("5ep", 2, 0.01)
    schedule = recipe.schedule(optax.cosine_decay_schedule(0.1, 40), 8, 3)
    tx = optax.chain(optax.sgd(schedule, momentum=0.9), recipe.transform(8, 3))
    batches = [images(16, seed) for seed in range(24)]
    variables = Dense(norm=True).init(jax.random.key(0), images(2))
    params, batch_stats = variables["params"], variables["batch_stats"]
    start = (params, batch_stats, tx.init(params))

    uninterrupted = train(tx, start, batches)
    crashed = train(tx, start, batches[: 3 * crash_epoch])
    saved = flax.serialization.to_bytes(crashed)
    restored = flax.serialization.from_bytes(start, saved)
    resumed = train(tx, restored, batches[3 * crash_epoch :])

    chex.assert_trees_all_equal(resumed, uninterrupted)
    assert swa_jax.swa_state(resumed[2]).num_averaged == 4


# Lightning's WeightAveraging asks should_update(step_idx) after every optimizer step
# and should_update(epoch_idx) after every epoch, with 0-based indices of what has just
# ended. Here update number t = step_idx + 1.
SHOULD_UPDATE: dict[
    str, tuple[Callable[[int], bool], optax.GradientTransformationExtraArgs]
] = {
    "every step": (lambda i: True, swa_jax.swa()),
    "from the 6th step on": (lambda i: i >= 5, swa_jax.swa(6)),
    "steps 3, 5, 7, ...": (lambda i: i >= 3 and i % 2 == 1, swa_jax.swa(4, 2)),
    "ends of epochs 2 to 4": (
        lambda i: i % 3 == 2 and 2 <= i // 3 <= 4,
        swa_jax.swa(9, 3, stop_step=15),
    ),
}


@pytest.mark.parametrize("name", SHOULD_UPDATE)
def test_should_update(name):
    """Its index logic, with a callback's loop and inside the optimizer."""
    should_update, tx = SHOULD_UPDATE[name]
    models = [np.float32(x) for x in np.random.default_rng(0).normal(size=18)]
    chosen = [model for i, model in enumerate(models) if should_update(i)]
    average = swa_jax.init_average(jnp.zeros(()))
    opt_state = tx.init(jnp.zeros(()))
    for i, model in enumerate(models):
        if should_update(i):
            average = swa_jax.update_average(average, model)
        _, opt_state = tx.update(model, opt_state, jnp.zeros(()))
    assert 0 < len(chosen) == average.num_averaged == opt_state.num_averaged
    assert_analytic_mean(average.avg_params, chosen)
    assert_analytic_mean(swa_jax.swa_params(opt_state, jnp.zeros(())), chosen)


@pytest.mark.parametrize(
    ("swa_epoch_start", "first"), [(0.8, 7), (0.5, 4), (2, 1), (9, 8)]
)
def test_lightnings_window(swa_epoch_start, first):
    """Which weights its StochasticWeightAveraging copies, and the call that does it.

    Its window goes from the 0-based epoch ``int(10 * 0.8) - 1``, or a given number
    less 1, to the last; it copies the weights when such an epoch *starts*, so never
    the final ones.
    """
    epochs, steps = 10, 4
    start = swa_epoch_start
    start = int(epochs * start) if isinstance(start, float) else start
    weights, copied = 0, []
    for epoch in range(epochs):
        if start - 1 <= epoch <= epochs - 1:
            copied.append(weights)
        weights += steps  # so many updates
    tx = swa_jax.swa(first * steps, steps, stop_step=(epochs - 1) * steps)
    opt_state, seen = tx.init(jnp.zeros(())), []
    for t in range(1, epochs * steps + 1):
        _, new = tx.update(jnp.zeros(()), opt_state, jnp.zeros(()))
        if new.num_averaged > opt_state.num_averaged:
            seen.append(t)
        opt_state = new
    assert seen == copied
