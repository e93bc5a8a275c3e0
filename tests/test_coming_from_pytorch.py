"""docs/coming-from-pytorch.md: every call in its tables does what the row says."""

import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import swa_jax
from tests.swa_jax.transformations import structure
from tests.test_docs import PAGES, run

PAGE = PAGES["coming-from-pytorch.md"]
S = 3  # updates in an epoch


def averaged_updates(tx: optax.GradientTransformation, length: int) -> list[int]:
    """The numbers of the updates, from 1, after which a model is averaged."""

    def update(opt_state: Any, _: Any) -> Any:
        _, opt_state = tx.update(jnp.zeros(()), opt_state, jnp.zeros(()))
        return opt_state, swa_jax.average_state(opt_state).num_averaged

    _, counts = jax.lax.scan(update, tx.init(jnp.zeros(())), length=length)
    return list(np.flatnonzero(np.diff(np.asarray(counts), prepend=0)) + 1)


# Which models are averaged

ROWS = re.findall(
    r"^\| (.+?) \| (.*?) ?\| ([\d, ]+) \| `(.+?)` \|$", PAGE, re.MULTILINE
)


def test_the_table_of_averaged_models_is_found():
    assert len(ROWS) == 11
    implementations = {row[0].split(",")[0] for row in ROWS}
    assert len(implementations) == 6


@pytest.mark.parametrize(("ends", "call"), dict.fromkeys(row[2:] for row in ROWS))
def test_each_call_averages_the_models_of_its_row(ends, call):
    """Over 10 epochs of 3 updates, asking after each whether one was averaged."""
    tx = eval(call, {"swa": swa_jax.swa, "SWA": swa_jax.SWA, "S": S})
    expected = [S * int(e) for e in ends.split(",")]
    assert averaged_updates(tx, 10 * S) == expected


@pytest.mark.slow
def test_side_by_side_loop_averages_what_pytorchs_does():
    namespace = run("coming-from-pytorch.md")
    # `epoch > swa_start` for epoch in range(10).
    assert namespace["num_averaged"] == len(range(namespace["swa_start"] + 1, 10))
    assert 0.8 < namespace["accuracy"] < 1
    # Two lines of PyTorch's loop, as recorded from PyTorch itself in test_parity:
    # multiplicative until swa_start, then two epochs of cosine to 0.05.
    steps = namespace["S"]
    rates = [float(namespace["schedule"](epoch * steps)) for epoch in range(10)]
    lr0 = 0.1 * 0.9**6
    expected = [0.1 * 0.9**e for e in range(6)] + [lr0, (lr0 + 0.05) / 2, 0.05, 0.05]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


# Names

SECTION = PAGE[PAGE.index("## Names") : PAGE.index("## A training loop")]
NAMES = dict(re.findall(r"^\| (.*`.*?) \| (.+?) \| .*\|$", SECTION, re.MULTILINE))
CHECKS: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {}


def row(
    name: str, **settings: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register the check of a row, named by its first cell.

    It is called with the scope of the row's calls, `settings` of its own among it, and
    with their values.
    """

    def register(check: Callable[..., None]) -> Callable[..., None]:
        assert name not in CHECKS
        CHECKS[name] = check, settings
        return check

    return register


class Net(nn.Module):
    """Scale and bias of its BatchNorm are parameters, mean and var statistics."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(2)(x))


@pytest.fixture
def scope() -> dict[str, Any]:
    """What the calls of the table mention."""
    rng = np.random.default_rng(0)
    net = Net()
    # The last batch is smaller: weights by batch and by example differ.
    batches = [rng.normal(size=(n, 3)).astype(np.float32) for n in (8, 8, 4)]
    variables = net.init(jax.random.key(0), batches[0], train=False)
    params, batch_stats = variables["params"], variables["batch_stats"]

    def fn(params: Any, batch_stats: Any, x: jax.Array) -> Any:
        variables = {"params": params, "batch_stats": batch_stats}
        return net.apply(variables, x, train=True, mutable=["batch_stats"])[1][
            "batch_stats"
        ]

    first = jax.tree.map(lambda p: p + 3.0, params)
    state = swa_jax.update_average(swa_jax.init_average(params), first)
    tx = optax.chain(optax.sgd(0.5), swa_jax.swa(start_step=1))
    opt_state = tx.init(params)
    for _ in range(2):  # at params - 0.5 both times
        _, opt_state = tx.update(jax.tree.map(jnp.ones_like, params), opt_state, params)
    return {
        **{name: getattr(swa_jax, name) for name in swa_jax.__all__},
        **{"jax": jax, "optax": optax, "S": S},
        **{"params": params, "batch_stats": batch_stats, "net": net},
        **{"fn": fn, "batches": batches},
        **{"first": first, "state": state, "opt_state": opt_state},
        **{"averaged": first, "avg_fn": lambda a, p: 0.25 * a + 0.75 * p},
        **{"base": optax.constant_schedule(0.4), "lr_init": 0.4, "swa_lr": 0.1},
        **{"swa_lrs": {"a": 0.1, "b": 0.2}, "labels": {"x": "a", "y": "b"}},
        **{"start_step": 6, "period": 3, "anneal_steps": 6, "step_idx": 11},
        **{"swa_start": 4, "swa_freq": 3, "swa_c_epochs": 2},
        **{"annealing_epochs": 2, "anneal_epochs": 2, "num_epochs": 10},
        **{"sharding": jax.sharding.SingleDeviceSharding(jax.devices()[1])},
        **{"recipe": swa_jax.SWA(0.5, 2, 0.1)},
    }


def test_each_row_of_the_names_has_a_check():
    lines = [line for line in SECTION.splitlines() if line.startswith("| `")]
    assert len(NAMES) == len(lines) >= 22
    assert NAMES.keys() == CHECKS.keys()


@pytest.mark.parametrize("name", NAMES)
def test_names_mean_what_the_row_says(name, scope):
    check, settings = CHECKS[name]
    calls = re.findall(r"`(.+?)`", NAMES[name])
    check(scope, *(eval(call, {**scope, **settings}) for call in calls))


def assert_close(found: Any, expected: Any) -> None:
    """Equal to float32 rounding, with the same structure."""
    assert structure(found) == structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6),
        found,
        expected,
    )


def rates(schedule: optax.Schedule, steps: int) -> list[float]:
    return [float(schedule(step)) for step in range(steps)]


def cosine(scope: dict[str, Any]) -> list[float]:
    """PyTorch's rates: 0.4 to 0.1 in two epochs from the third on, epoch by epoch."""
    middle = (scope["lr_init"] + scope["swa_lr"]) / 2  # (1 - cos(pi / 2)) / 2 = 1 / 2
    return [0.4] * 3 * S + [middle] * S + [0.1] * 2 * S


def check_statistics(scope: dict[str, Any], found: Any, weights: list[int]) -> None:
    """Mean and variance of each batch, weighed, in float64."""
    dense = jax.tree.map(
        lambda p: np.asarray(p, np.float64), scope["params"]["Dense_0"]
    )
    values = [
        x.astype(np.float64) @ dense["kernel"] + dense["bias"] for x in scope["batches"]
    ]
    mean = np.average([v.mean(0) for v in values], axis=0, weights=weights)
    var = np.average([v.var(0) for v in values], axis=0, weights=weights)
    # Variances are differences of float32 sums, of values near 1.
    statistics = found["BatchNorm_0"]
    np.testing.assert_allclose(statistics["mean"], mean, atol=1e-5)
    np.testing.assert_allclose(statistics["var"], var, atol=1e-5)


def check_update(scope: dict[str, Any], state: swa_jax.SWAState) -> None:
    """A second model enters the mean of one."""
    assert int(state.num_averaged) == 2
    expected = jax.tree.map(lambda a, b: (a + b) / 2, scope["first"], scope["params"])
    assert_close(state.avg_params, expected)


@row("`AveragedModel(model)`")
def _(scope, state, tx):
    assert int(state.num_averaged) == int(tx.init(scope["params"]).num_averaged) == 0
    assert averaged_updates(tx, 12) == [6, 9, 12]


@row("`.update_parameters(model)`")
def _(scope, state):
    check_update(scope, state)


@row("`.n_averaged`")
def _(scope, count):
    assert int(count) == 1


@row("`.module`")
def _(scope, averaged, mean):
    assert_close(averaged, jax.tree.map(lambda p: p - 0.5, scope["params"]))
    assert_close(mean, scope["first"])


@row("`get_swa_multi_avg_fn()`, `use_buffers=False`")
def _(scope):
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), scope["params"])
    for leaf in jax.tree.leaves(swa_jax.init_average(narrow).avg_params):
        assert leaf.dtype == jnp.float32


@row("`use_buffers=True`")
def _(scope, along, variables, init_average, update_average):
    """Every array of the model is in it: scale, bias, mean and var of one name."""
    state = init_average(variables)
    later = jax.tree.map(lambda leaf: leaf + 2.0, variables)
    for model in (variables, later):
        state = update_average(state, model)
    assert_close(state.avg_params, jax.tree.map(lambda leaf: leaf + 1.0, variables))
    norms = [state.avg_params[kind]["BatchNorm_0"] for kind in variables]
    assert [sorted(norm) for norm in norms] == [["bias", "scale"], ["mean", "var"]]
    scope["net"].apply(state.avg_params, scope["batches"][0], train=False)

    params, chained = variables["params"], along.init(variables["params"])
    for model in (variables, later):
        updates = jax.tree.map(jnp.subtract, model["params"], params)
        _, chained = along.update(
            updates, chained, params, batch_stats=model["batch_stats"]
        )
    assert_close(chained.avg_params, state.avg_params)


@row("`get_ema_multi_avg_fn(0.999)`")
def _(scope, tx):
    first, params = scope["first"], scope["params"]
    state = swa_jax.init_average(params, tx)
    for model in (first, params):
        state = swa_jax.update_average(state, model, tx)
    expected = jax.tree.map(lambda e, p: 0.999 * e + 0.001 * p, first, params)
    assert_close(state.avg_params, expected)


@row("`SWALR(opt, swa_lr, anneal_epochs, anneal_strategy)`")
def _(scope, schedule):
    np.testing.assert_allclose(rates(schedule, 6 * S), cosine(scope), rtol=1e-6)


@row("`SWALR(opt, swa_lr=[a, b])`")
def _(scope, tx):
    ones = {"x": jnp.ones(()), "y": jnp.ones(())}
    state = tx.init(ones)
    for _ in range(scope["start_step"] + scope["anneal_steps"] + 1):
        updates, state = tx.update(ones, state)
    assert_close(updates, {"x": jnp.float32(-0.1), "y": jnp.float32(-0.2)})


@row("`update_bn(loader, swa_model)`")
def _(scope, batch_stats):
    check_statistics(scope, batch_stats, [1, 1, 1])


@row("`AveragedModel(model, avg_fn=..., multi_avg_fn=...)`")
def _(scope, tree):
    before, params = scope["averaged"], scope["params"]
    assert_close(tree, jax.tree.map(lambda a, p: 0.25 * a + 0.75 * p, before, params))


@row("`AveragedModel(model, device=...)`")
def _(scope, state):
    for leaf in jax.tree.leaves(state.avg_params):
        assert leaf.sharding == scope["sharding"]


@row("`SWA(opt, swa_start, swa_freq, swa_lr)` (torchcontrib)")
def _(scope, tx, schedule):
    start, freq = scope["swa_start"], scope["swa_freq"]
    expected = [t for t in range(1, 31) if t > start and t % freq == 0]
    assert averaged_updates(tx, 30) == expected
    np.testing.assert_allclose(rates(schedule, 8), [0.4] * start + [0.1] * (8 - start))


@row("`.update_swa()`, `.swap_swa_sgd()`, `.bn_update()` (torchcontrib)")
def _(scope, state, averaged, batch_stats):
    check_update(scope, state)
    assert_close(averaged, jax.tree.map(lambda p: p - 0.5, scope["params"]))
    check_statistics(scope, batch_stats, [8, 8, 4])


@row("`--swa_start`, `--swa_c_epochs`, `--swa_lr` (original repository)")
def _(scope, tx, schedule):
    start, cycle = scope["swa_start"], scope["swa_c_epochs"]
    epochs = [e for e in range(start, 11) if (e - start) % cycle == 0]
    assert averaged_updates(tx, 10 * S) == [S * e for e in epochs]
    # train.py's `schedule`, at the start of each epoch.
    at = np.arange(6) / start
    factor = np.interp(at, [0.5, 0.9], [1.0, 0.1 / 0.4])
    found = [float(schedule(epoch * S)) for epoch in range(6)]
    np.testing.assert_allclose(found, 0.4 * factor, rtol=1e-6)


@row("`utils.moving_average`, `utils.bn_update` (original repository)")
def _(scope, state, batch_stats):
    check_update(scope, state)
    check_statistics(scope, batch_stats, [8, 8, 4])


@row(
    "`StochasticWeightAveraging(swa_lrs, annealing_epochs, annealing_strategy)`"
    " (Lightning)"
)
def _(scope, schedule):
    np.testing.assert_allclose(rates(schedule, 6 * S), cosine(scope), rtol=1e-6)


@row("`WeightAveraging.should_update(step_idx, epoch_idx)` (Lightning)")
def _(scope, tx, number):
    assert number == 12
    assert averaged_updates(tx, 12) == [6, 9, number]


@row("`SWA(swa_start, anneal_epochs, swa_lr)` (Composer)", swa_start=0.5)
def _(scope, recipe):
    assert averaged_updates(recipe.transform(10, S), 30) == [18, 21, 24, 27, 30]
    found = rates(recipe.schedule(scope["base"], 10, S), 10 * S)
    np.testing.assert_allclose(found[-4 * S :], [0.25] * S + [0.1] * 3 * S, rtol=1e-6)


@row('`swa_start="0.7dur", swa_end="0.97dur"`, linear (Composer, later: its defaults)')
def _(scope, recipe):
    # Of 100 epochs the ends of the 70th to the 97th.
    expected = [S * epoch for epoch in range(70, 98)]
    assert averaged_updates(recipe.transform(100, S), 100 * S) == expected
    assert recipe.anneal_strategy == "linear"


@row("`schedule_swa_lr=False` (Composer, later: its default)")
def _(scope, tx):
    assert averaged_updates(tx, 10 * S) == [18, 21, 24, 27, 30]
    updates, _ = tx.update(jnp.ones(()), tx.init(jnp.zeros(())), jnp.zeros(()))
    assert float(updates) == pytest.approx(-0.4)  # the main schedule's rate


@row("`anneal_steps` (Composer, later)")
def _(scope, recipe):
    assert recipe.anneal_epochs == 2


# Exponential averages. test_parity_averages.py compares them with the peers' numbers.

OTHERS = re.findall(
    r"^\| (.+?) \| (.*?) ?\| `((?:power_)?ema\(.+?)` \| .*\|$",
    PAGE[PAGE.index("## Exponential averages") : PAGE.index("## Learning rates")],
    re.MULTILINE,
)
#: Numbers for what a row mentions, each unlike all others.
SETTINGS = {
    **{"d": 0.9, "a": 4, "e": 2, "inv_gamma": 3.0, "power": 0.75, "min_decay": 0.2},
    **{"warmup_gamma": 3.0, "warmup_power": 0.75, "min_value": 0.2, "gamma": 2.0},
    "std": 0.1,
}


def warmed_up(inv_gamma: float, least: float) -> Callable[[int], float]:
    return lambda n: min(max(1 - (1 + (n - 1) / inv_gamma) ** -0.75, least), 0.9)


def constant(n: int) -> float:
    return 0.9


#: What the peer's average keeps as its n-th model enters, and the updates of the first
#: two models.
KEPT = {
    "PyTorch `AveragedModel`, `get_ema_multi_avg_fn(d)`": (constant, 1, 2),
    "timm `ModelEmaV3`, `use_warmup`, `update(model, step=t)`": (
        warmed_up(3, 0.2),
        5,
        6,
    ),
    "timm `ModelEmaV3`, no warm-up, with a step": (constant, 5, 6),
    "timm `ModelEmaV3`, no step": (constant, 1, 2),
    "ema-pytorch `EMA`, `update_every=1`": (warmed_up(3, 0.2), 5, 6),
    "ema-pytorch `EMA`, `update_every=e`, `a` a multiple of e": (
        warmed_up(1.5, 0.0),
        5,
        7,
    ),
    "diffusers `EMAModel`, its default": (lambda n: min(0.9, n / (9 + n)), 5, 6),
    "diffusers `EMAModel`, `use_ema_warmup`": (warmed_up(3, 0.2), 5, 6),
    "Keras `use_ema`, ": (constant, 1, 2),
    "optax `ema(d)`, fed with weights": (lambda n: 1 - 0.1 / (1 - 0.9**n), 1, 2),
    # (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) is 0.1^2 at this gamma.
    "EDM2 `PowerFunctionEMA`, `std`": (lambda n: (1 - 1 / n) ** 7.937203938, 1, 2),
    "ema-pytorch `KarrasEMA`, `update_every=e`": (
        lambda n: (1 - 1 / ((n - 1) * 2 + 2)) ** 3,
        1,
        3,
    ),
}


def test_the_table_of_exponential_averages_is_found():
    assert [f"{peer}, {setting}" for peer, setting, _ in OTHERS] == list(KEPT)


@pytest.mark.parametrize(("peer", "setting", "call"), OTHERS)
def test_each_average_has_the_rates_of_its_row(peer, setting, call):
    kept, first, second = KEPT[f"{peer}, {setting}"]
    names = {name: getattr(swa_jax, name) for name in swa_jax.__all__}
    tx = eval(call, {**names, **SETTINGS, "jnp": jnp})
    rates = np.array([1.0, *(1 - kept(i) for i in range(2, 13))])
    expected = rates * np.append(np.cumprod((1 - rates[1:])[::-1])[::-1], 1.0)
    found = swa_jax.averaging_weights(tx, 12)
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # float32 decays
    assert averaged_updates(optax.chain(tx), 12)[:2] == [first, second]
