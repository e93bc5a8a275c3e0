"""Whatever comes, and in whatever order: averages against a model of them in NumPy.

Hypothesis draws sequences of updates, mistakes, kills, restores and moves. A
hundred of them run with the slow tests, ten thousand before a release: CONTRIBUTING.
"""

import os
import pickle
import tempfile
import warnings

import flax.serialization
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import swa_jax

EXAMPLES = int(os.environ.get("SWA_JAX_HOSTILE_EXAMPLES", "100"))
pytestmark = pytest.mark.slow


# What each average is, by its definition: the weight of each of n models.


def equal(n):
    return np.full(n, 1 / n)


def exponential(decay):
    def weights(n):
        found = decay ** np.arange(n - 1, -1, -1.0)
        return found / found.sum()

    return weights


def growing(decay):
    """Of `ema_warmup(decay)`, model by model."""

    def weights(n):
        found = np.zeros(n)
        for number in range(1, n + 1):
            old = np.clip(1 - float(number) ** (-2 / 3), 0, decay)
            found *= old
            found[number - 1] = 1 - old
        return found

    return weights


def power(sigma):
    gamma = np.roots([1, 7, 16 - sigma**-2, 12 - sigma**-2]).real.max()

    def weights(n):
        edges = np.arange(n + 1) ** (gamma + 1.0)
        return np.diff(edges) / edges[-1]

    return weights


def latest(window):
    return lambda n: np.where(np.arange(n) >= n - window, 1 / min(n, window), 0)


AVERAGES = {
    "swa": (swa_jax.swa, {}, equal),
    "compensated": (swa_jax.swa, {"compensated": True}, equal),
    "ema": (swa_jax.ema, {"decay": 0.9}, exponential(0.9)),
    "ema_warmup": (swa_jax.ema, {"decay": swa_jax.ema_warmup(0.8)}, growing(0.8)),
    "power_ema": (swa_jax.power_ema, {"sigma_rel": 0.1}, power(0.1)),
    "lawa": (swa_jax.lawa, {"window": 3}, latest(3)),
    "swag": (swa_jax.swag, {"rank": 2}, equal),
}
# Start, period, stop: of every update, of some, of none after a while.
TIMES = [(0, 1, None), (2, 2, None), (1, 1, 4)]
TREES = [
    {"w": ((8, 3), "float32"), "b": ((), "float32")},
    {
        "half": ((8,), "bfloat16"),
        "deep": [((2, 2), "float16"), None, ((8, 2), "float32")],
    },
    {"empty": ((0, 2), "float32"), "count": ((), "int32"), "w": ((8,), "float32")},
]
#: In this thread, for a machine that is torn down waits for nothing.
ORBAX = ocp.Checkpointer(ocp.StandardCheckpointHandler())
#: Of a sum of a few dozen float32 terms, next to the largest of them.
ROUNDING = 3e-6


def is_spec(x):
    return isinstance(x, tuple)


def drawn(tree, seed, scale):
    """Weights for a tree of shapes and dtypes."""
    rng = np.random.default_rng(seed)

    def one(spec):
        shape, dtype = spec
        if dtype == "int32":
            return jnp.asarray(rng.integers(0, 100), dtype)
        return jnp.asarray(scale * rng.normal(size=shape), dtype)

    return jax.tree.map(one, tree, is_leaf=is_spec)


def numbers(tree):
    return [np.asarray(x).astype(np.float64) for x in jax.tree.leaves(tree)]


def bytes_of(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


class Hostile(RuleBasedStateMachine):
    """One average, what is on disk, and what both should be."""

    @initialize(
        name=st.sampled_from(sorted(AVERAGES)),
        times=st.sampled_from(TIMES),
        tree=st.sampled_from(range(len(TREES))),
    )
    def begin(self, name, times, tree):
        make, options, self.weights = AVERAGES[name]
        self.start, self.period, self.stop = times
        timing = {"start_step": times[0], "period": times[1], "stop_step": times[2]}
        self.average = make(**options, **timing)
        self.spec = TREES[tree]
        self.params = drawn(self.spec, 0, 1.0)
        self.state = swa_jax.init_average(self.params, self.average)
        self.updates, self.models = 0, []  # the model of it all
        self.disk = None
        self.folder = tempfile.TemporaryDirectory()

    def teardown(self):
        if hasattr(self, "folder"):
            self.folder.cleanup()

    # What a user does.

    @rule(seed=st.integers(1, 10**6), scale=st.sampled_from([1e-3, 1.0, 1e3]))
    def update(self, seed, scale):
        self.params = drawn(self.spec, seed, scale)
        self.state = swa_jax.update_average(self.state, self.params, self.average)
        self._count(True)

    @rule(seed=st.integers(1, 10**6), sample=st.booleans(), traced=st.booleans())
    def update_where_it_is_said(self, seed, sample, traced):
        self.params = drawn(self.spec, seed, 1.0)
        self.state = swa_jax.update_average(
            self.state,
            self.params,
            self.average,
            sample=jnp.asarray(sample) if traced else sample,
        )
        self._count(sample)

    def _count(self, sample):
        self.updates += 1
        late = self.stop is not None and self.updates > self.stop
        past = self.updates - self.start
        if sample and not late and past >= 0 and past % self.period == 0:
            self.models.append(numbers(self.params))

    @rule(how=st.sampled_from(["flax", "pickle", "orbax"]))
    def save(self, how):
        if how == "orbax" and "empty" in self.spec:
            how = "flax"  # Orbax refuses arrays of no elements
        if how == "flax":
            content = flax.serialization.to_bytes(self.state)
        elif how == "pickle":
            content = pickle.dumps(jax.tree.map(np.array, self.state))
        else:
            content = (
                f"{self.folder.name}/{self.updates}-{len(os.listdir(self.folder.name))}"
            )
            ORBAX.save(content, args=ocp.args.StandardSave(self.state))
        model = self.updates, list(self.models)
        self.disk = how, content, model, bytes_of(self.state)

    @precondition(lambda self: self.disk is not None)
    @rule(sharded=st.booleans())
    def kill_and_restore(self, sharded):
        """All that was not saved is gone."""
        how, content, (updates, models), before = self.disk
        self.state = None
        new = swa_jax.init_average(drawn(self.spec, 1, 1.0), self.average)
        if sharded:
            new = jax.tree.map(lambda x: jax.device_put(x, self._spread(x)), new)
        if how == "flax":
            restored = flax.serialization.from_bytes(new, content)
            self.state = jax.tree.map(jnp.asarray, restored)
        elif how == "pickle":
            self.state = jax.tree.map(jnp.asarray, pickle.loads(content))
        else:
            self.state = ORBAX.restore(content, args=ocp.args.StandardRestore(new))
        self.updates, self.models = updates, list(models)
        assert bytes_of(self.state) == before

    def _spread(self, x):
        mesh = Mesh(np.array(jax.devices()), ("d",))
        divides = x.ndim > 0 and x.shape[0] and x.shape[0] % len(jax.devices()) == 0
        return NamedSharding(mesh, PartitionSpec("d") if divides else PartitionSpec())

    @rule(spread=st.booleans())
    def move(self, spread):
        """To all devices, or to one."""
        before = bytes_of(self.state)
        self.state = jax.tree.map(
            lambda x: jax.device_put(
                x, self._spread(x) if spread else jax.devices()[0]
            ),
            self.state,
        )
        assert bytes_of(self.state) == before

    # What goes wrong.

    @rule(how=st.sampled_from(["shape", "missing", "more", "type", "dtype", "average"]))
    def mistake(self, how):
        """It is refused, and nothing is lost."""
        before, wrong = bytes_of(self.state), dict(self.params)
        average = self.average
        if how == "shape":
            wrong["w" if "w" in wrong else "half"] = jnp.zeros((5, 5))
        elif how == "missing":
            wrong.popitem()
        elif how == "more":
            wrong["another"] = jnp.zeros(3)
        elif how == "type":
            wrong["w" if "w" in wrong else "half"] = "weights"
        elif how == "dtype":
            name = "w" if "w" in wrong else "half"
            wrong[name] = wrong[name].astype(jnp.int32)
        else:
            kinds = swa_jax.lawa(2), swa_jax.swag(3)
            average = kinds[isinstance(self.state, swa_jax.LAWAState)]
        with pytest.raises((TypeError, ValueError)):
            swa_jax.update_average(self.state, wrong, average)
        assert bytes_of(self.state) == before

    @rule(bad=st.sampled_from([np.nan, np.inf, -np.inf]))
    def not_finite(self, bad):
        """Left out where that was asked for, and counted as an update."""
        name = "w" if "w" in self.params else "half"
        wrong = dict(self.params)
        wrong[name] = wrong[name].at[0].set(bad)
        before = bytes_of(swa_jax.averaged_with(self.state, self.params, self.average))
        assert before  # nothing was donated
        self.state = swa_jax.update_average(
            self.state, wrong, self.average, skip_nonfinite=True
        )
        self._count(False)

    @precondition(lambda self: self.disk is not None and self.disk[0] == "flax")
    @rule(cut=st.floats(0.05, 0.95))
    def truncated(self, cut):
        """A file that was cut off is no average."""
        content = self.disk[1]
        new = swa_jax.init_average(self.params, self.average)
        with pytest.raises(Exception):  # noqa: B017 - Flax's own
            flax.serialization.from_bytes(new, content[: int(cut * len(content))])

    # What must hold all the time.

    @invariant()
    def counters_are_right(self):
        if not hasattr(self, "state"):
            return
        assert int(self.state.num_updates) == self.updates
        assert int(swa_jax.models_in_average(self.state)) == (
            min(3, len(self.models))
            if isinstance(self.state, swa_jax.LAWAState)
            else len(self.models)
        )

    @invariant()
    def the_average_is_right(self):
        if not hasattr(self, "state"):
            return
        before = bytes_of(self.state)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = swa_jax.averaged_params(self.state, self.params, allow_empty=True)
        assert jax.tree.structure(found) == jax.tree.structure(self.params)
        assert bytes_of(self.state) == before
        if not self.models:
            assert bytes_of(found) == bytes_of(self.params)
            return
        weights = self.weights(len(self.models))
        leaves = zip(jax.tree.leaves(found), jax.tree.leaves(self.params), strict=True)
        for index, (leaf, param) in enumerate(leaves):
            assert (leaf.dtype, leaf.shape) == (param.dtype, param.shape)
            models = np.stack([model[index] for model in self.models])
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                continue  # carried along as it was last, which `latest` may not be
            expected = np.tensordot(weights, models, 1)
            slack = ROUNDING * np.abs(models).max(initial=0)
            slack += float(jnp.finfo(leaf.dtype).eps) * np.abs(expected)
            off = np.abs(np.asarray(leaf).astype(np.float64) - expected)
            assert (off <= slack).all(), (off, slack)


def test_nothing_breaks_an_average():
    settings = hypothesis.settings(
        max_examples=EXAMPLES,
        stateful_step_count=12,
        deadline=None,
        database=None,
        derandomize="SWA_JAX_HOSTILE_EXAMPLES" not in os.environ,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    run_state_machine_as_test(Hostile, settings=settings)


@pytest.mark.parametrize("name", AVERAGES)
def test_a_wrong_weight_would_be_seen(name, monkeypatch):
    """The model of it all is no copy of the library: 1 % in one weight is found."""
    make, options, weights = AVERAGES[name]

    def wrong(n):
        found = np.array(weights(n))
        found[-1] *= 1.01
        return found

    monkeypatch.setitem(AVERAGES, name, (make, options, wrong))
    machine = Hostile()
    machine.begin(name, TIMES[0], 0)
    for seed in range(3):
        machine.update(seed, 1.0)
    with pytest.raises(AssertionError):
        machine.the_average_is_right()
    machine.teardown()
