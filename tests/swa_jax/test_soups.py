"""Averages of models that exist: soups, greedy soups, and the merge for a decay."""

import gc
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import swa_jax

from .transformations import U, half_ulp

#: The default run takes two cases of each test here, see conftest.py.
pytestmark = pytest.mark.sample(2)

WEIGHTS = {
    "positive": [0.1, 2.0, 0.7, 1.2, 3.0],
    "negative": [-0.4, 1.0, -0.3, 0.5, 0.7],
    "zeros": [0.0, 0.0, 1.0, 0.0, 0.0],
}


def models(count=5, dtype=np.float32, near=0.0):
    rng = np.random.default_rng(3)
    return [
        {"w": (near + rng.normal(size=(3, 2))).astype(dtype), "b": [np.float32(i)]}
        for i in range(count)
    ]


def combined(trees, weights):
    """In float64."""
    weights = np.asarray(weights, np.float64) / np.sum(weights)
    exact = lambda *leaves: sum(  # noqa: E731
        w * np.asarray(x, np.float64) for w, x in zip(weights, leaves, strict=True)
    )
    return jax.tree.map(exact, *trees)


def assert_close(found, expected, dtype, magnitude):
    """Within a rounding of each product and sum, and one of the result."""

    def check(got, want):
        assert isinstance(got, jax.Array)
        tolerance = magnitude * (12 * U + half_ulp(got.dtype))
        np.testing.assert_allclose(np.asarray(got, np.float64), want, 0, tolerance)

    jax.tree.map(check, found, expected)
    assert found["w"].dtype == dtype


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize("weights", [None, *WEIGHTS.values()], ids=str)
def test_soup(dtype, weights):
    trees = models(dtype=dtype)
    expected = combined(trees, weights or [1] * 5)
    magnitude = 4 * np.abs(weights or 1).max() * 5 / abs(np.sum(weights or [1] * 5))
    for source in (trees, iter(trees), tuple(trees)):
        assert_close(swa_jax.soup(source, weights), expected, dtype, magnitude)


@pytest.mark.parametrize("number", [5, 50, 500])
def test_soup_of_many_stays_close(number):
    # Sums of float32 shares near 1 round by half an ulp of 1 at most, each time.
    trees = models(number, near=1.0)
    for weights in (None, np.linspace(1, 2, number)):
        found = swa_jax.soup(trees, weights)["w"]
        expected = combined(trees, np.ones(number) if weights is None else weights)
        error = np.abs(np.asarray(found, np.float64) - expected["w"]).max()
        assert error < 5 * U * number


def test_soup_of_one_model_is_that_model_to_the_bit():
    tree = {"w": np.array([np.pi, -1e30, 1e-30], np.float32)}
    for weights in (None, [7.0]):
        found = swa_jax.soup([tree], weights)
        np.testing.assert_array_equal(found["w"], tree["w"])
        assert found["w"] is not tree["w"]


@pytest.mark.parametrize("weights", [None, [1, 2, 3]])
def test_leaves_that_are_not_averaged(weights):
    trees = [
        {
            "w": jnp.full(2, float(i)),
            "z": jnp.full(2, i * 1j, jnp.complex64),
            "int": jnp.int32(i),
            "key": jax.random.key(i),
            "none": None,
            "hidden": optax.MaskedNode(),
            "f8": jnp.full(2, i, jnp.float8_e4m3fn),
        }
        for i in (1, 2, 6)
    ]
    found = swa_jax.soup(trees, weights)
    mean = 3.0 if weights is None else (1 + 4 + 18) / 6
    np.testing.assert_allclose(found["w"], [mean] * 2, rtol=4 * U)
    np.testing.assert_allclose(found["z"], [mean * 1j] * 2, rtol=8 * U)
    assert found["f8"].dtype == jnp.float8_e4m3fn
    np.testing.assert_array_equal(found["f8"], jnp.full(2, mean, jnp.float8_e4m3fn))
    assert (int(found["int"]), found["none"], found["hidden"]) == (
        6,
        None,
        optax.MaskedNode(),
    )
    assert found["key"] == jax.random.key(6)


@pytest.mark.slow
@pytest.mark.parametrize("weights", [None, [1.0] * 6, [1, -1, 1, -1, 1, 1]], ids=str)
def test_soup_keeps_one_model_in_memory(weights):
    made: list = []

    class Weights(np.ndarray):
        pass

    def stream():
        for i in range(6):
            gc.collect()
            assert not [ref for ref in made if ref() is not None]
            model = np.full(3, i, np.float32).view(Weights)
            made.append(weakref.ref(model))
            yield {"w": model}
            del model

    swa_jax.soup(stream(), weights)
    assert len(made) == 6


def test_soup_where_the_models_are():
    mesh = jax.make_mesh((8,), ("x",))
    spread = NamedSharding(mesh, P("x"))
    trees = [jax.device_put(np.full(8, i, np.float32), spread) for i in (1, 2)]
    for weights in (None, [3, 1]):
        found = swa_jax.soup([trees[0], np.asarray(trees[1])], weights)
        assert found.sharding.is_equivalent_to(spread, 1)
        np.testing.assert_allclose(found, [1.5 if weights is None else 1.25] * 8)


GOOD = {"w": np.zeros(2, np.float32)}
REFUSED: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "no model": (([],), ValueError, "soup: models is empty"),
    "one model": ((GOOD,), TypeError, "must be several pytrees, got a dict.*pass a li"),
    "an array": ((np.ones(2),), TypeError, "must be several pytrees"),
    "a number": ((3,), TypeError, "must be several pytrees, got 3"),
    "a shape": (
        ([GOOD, {"w": np.zeros(3)}],),
        ValueError,
        r"models\[1\]\['w'\] has shape \(3,\), the first model has \(2,\)",
    ),
    "a structure": (
        ([GOOD, GOOD, {"v": np.zeros(2)}],),
        ValueError,
        r"soup: models\[2\] must have the structure of the first model; only in.*'v'",
    ),
    "a dtype": (([GOOD, {"w": np.arange(2)}],), ValueError, r"models\[1\].*int32"),
    "no array": (([{"w": "a"}],), TypeError, r"soup: models\[0\]\['w'\] is a str"),
    "few weights": (([GOOD, GOOD], [1]), ValueError, "weights has 1 numbers.* 2 model"),
    "many weights": (([GOOD], [1, 2]), ValueError, "weights has 2 numbers.* 1 models"),
    "sum 0": (([GOOD, GOOD], [1, -1]), ValueError, "whose sum is not 0.*got .1.0, -1"),
    "sum near 0": (([GOOD] * 3, [0.1, 0.2, -0.3]), ValueError, "whose sum is not 0"),
    "nan": (([GOOD], [np.nan]), ValueError, "weights must be finite"),
    "no weights": (([GOOD], []), ValueError, "weights must be finite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_soup_refuses(case):
    arguments, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        swa_jax.soup(*arguments)


# Greedy.


def wortsman(trees, scores, evaluate):
    """The published recipe, in float64: the models that stay, in their order."""
    order = sorted(range(len(trees)), key=lambda i: -scores[i])
    kept, best = [order[0]], scores[order[0]]
    for i in order[1:]:
        score = evaluate(np.mean([trees[j] for j in [*kept, i]], axis=0))
        if score >= best:
            kept, best = [*kept, i], score
    return kept


@pytest.mark.parametrize("seed", range(5))
def test_greedy_soup_is_the_published_recipe(seed):
    rng = np.random.default_rng(seed)
    best = rng.normal(size=4)
    trees = [best + rng.normal(size=4) * s for s in (0.3, 0.5, 1, 2, 4, 0.4)]
    evaluate = lambda w: -float(np.sum((np.asarray(w, np.float64) - best) ** 2))  # noqa: E731
    scores = list(map(evaluate, trees))
    kept = wortsman(trees, scores, evaluate)
    assert 1 < len(kept) < len(trees)
    narrow = [np.asarray(tree, np.float32) for tree in trees]
    calls = []

    def counted(w):
        calls.append(w)
        return evaluate(w)

    found = swa_jax.greedy_soup(narrow, scores, counted)
    expected = np.mean([trees[i] for i in kept], axis=0)
    np.testing.assert_allclose(found, expected, atol=40 * U)
    assert len(calls) == len(trees) - 1


def test_greedy_soup_keeps_what_is_not_worse_and_drops_nan():
    trees = [jnp.full(1, float(i)) for i in range(4)]
    scores = [0.0, 3.0, 2.0, 1.0]
    seen = []

    def evaluate(w):
        seen.append(float(w[0]))
        return {1.5: 3.0, (1.5 * 2 + 3) / 3: float("nan")}.get(seen[-1], -1.0)

    # 1 first; with 2 as good as before; with 3 it is NaN; with 0 worse.
    found = swa_jax.greedy_soup(trees, scores, evaluate)
    assert seen == [1.5, 2.0, 1.0]
    np.testing.assert_array_equal(found, [1.5])


def test_greedy_soup_gives_models_in_their_dtype_and_loads_one_at_a_time():
    class Stored:
        """What looks like a list, and loads."""

        def __init__(self):
            self.loaded = []

        def __len__(self):
            return 3

        def __getitem__(self, index):
            self.loaded.append(index)
            return {"w": np.full(2, index, jnp.bfloat16), "n": np.int32(index)}

    stored, dtypes = Stored(), []

    def evaluate(params):
        dtypes.append(params["w"].dtype)
        return 1.0

    found = swa_jax.greedy_soup(stored, [0.1, 0.3, 0.2], evaluate)
    assert stored.loaded == [1, 2, 0]
    assert {*dtypes, found["w"].dtype} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(np.asarray(found["w"], np.float32), [1, 1])


@pytest.mark.parametrize(
    ("trees", "scores", "message"),
    [
        ([], [], "got 0 models and 0 scores"),
        ([GOOD], [1, 2], "got 1 models and 2 scores"),
        ([GOOD, GOOD], [1, np.nan], "scores must be numbers, got .1.0, nan"),
        ([GOOD, {"w": np.zeros(3)}], [1, 0], r"greedy_soup: models\[1\].*the first mo"),
    ],
)
def test_greedy_soup_refuses(trees, scores, message):
    with pytest.raises(ValueError, match=message):
        swa_jax.greedy_soup(trees, scores, lambda _: 0.0)


# The merge that stands for a decay.

DECAYS = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: np.cos(np.pi * x / 2) ** 2,
    "1-sqrt": lambda x: 1 - np.sqrt(x),
    "to a tenth": lambda x: 1 - 0.9 * x,
    "with a rise": lambda x: 1 - 2 * x * (1 - x),
}


@pytest.mark.parametrize("k", [1, 2, 7, 40])
@pytest.mark.parametrize("name", DECAYS)
def test_merge_is_where_decayed_steps_lead(name, k):
    # Steps g of a run at a constant rate, and the same ones at a rate that decays.
    decay = DECAYS[name]
    steps = np.random.default_rng(k).normal(size=(k, 3))
    run = np.cumsum(steps, 0)
    decayed = run[0] + sum(decay(i / k) * steps[i] for i in range(1, k))
    own = name in ("to a tenth", "with a rise")
    weights = swa_jax.decay_weights(decay if own else name, k)
    assert weights.shape == (k,)
    assert weights.dtype == np.float64
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-14)
    np.testing.assert_allclose(weights @ run, decayed, atol=1e-12)
    assert (weights.min() < 0) == (name == "with a rise" and k > 2)
    merged = swa_jax.soup([np.asarray(x, np.float32) for x in run], weights)
    np.testing.assert_allclose(merged, decayed, atol=8 * k * U * np.abs(run).max())


def test_linear_decay_is_the_plain_mean():
    np.testing.assert_allclose(swa_jax.decay_weights("linear", 9), [1 / 9] * 9)


@pytest.mark.parametrize(
    ("decay", "k", "error", "message"),
    [
        ("exp", 3, ValueError, "decay must be one of 'linear', 'cosine', '1-sqrt'"),
        ("linear", 0, ValueError, "k must be at least 1, got 0"),
        ("linear", 2.5, TypeError, "k must be an integer.*number of models"),
        (lambda x: x, 3, ValueError, "1 at 0.*got 0 at 0"),
        (lambda x: np.inf if x else 1, 3, ValueError, "decay must be finite"),
        (0.9, 3, ValueError, "decay must be one of"),
    ],
    ids=["name", "none", "half", "start", "infinite", "number"],
)
def test_decay_weights_refuse(decay, k, error, message):
    with pytest.raises(error, match=message):
        swa_jax.decay_weights(decay, k)
