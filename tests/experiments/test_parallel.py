import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import swa_jax
from experiments.config.schema import override
from experiments.runtime.errors import DevicesError
from experiments.training import parallel
from experiments.training.loop import Hooks, train
from experiments.training.optimizer import make_optimizer
from experiments.training.parallel import AXIS_NAME, make_strategy
from experiments.training.scoring import averaged_variables, make_batch_stats_fn
from experiments.training.step import make_train_step
from tests.helpers import compile_arm, largest_difference, train_batches

STRATEGIES = ["pmap", "shard_map", "jit"]
# 12 steps. In each, a device order of its own rounds the gradient differently, and the
# weights absorb that: by up to one unit in the last place of the largest of them (below
# 2, so float32's eps) for the step itself, and as much for what momentum gathers.
STEPS = 12
ATOL = 2 * STEPS * float(np.finfo(np.float32).eps)


@pytest.fixture(scope="module")
def spread(tiny_model):
    """Two rows of each batch for each of the 8 devices; 2 steps an epoch."""
    return override(tiny_model, batch_size=16, epochs=STEPS // 2, swa_epochs=(4,))


def statistics(arm):
    """The shapes of an arm's BatchNorm statistics."""
    return jax.eval_shape(arm.init, jax.random.key(0)).batch_stats


class Recorder(Hooks):
    def __init__(self):
        self.losses, self.averages = [], []

    def on_step(self, step, loss, learning_rate):
        self.losses.append(loss)

    def on_epoch_end(self, epoch, step, state):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        self.averages.append(
            swa_jax.swa_params(state.opt_state, variables, allow_empty=True)
        )
        assert {leaf.sharding for leaf in jax.tree.leaves(state)} == {
            jax.sharding.SingleDeviceSharding(jax.devices()[0])
        }


def run(config, split):
    recorder = Recorder()
    state = train(compile_arm(config, split, 4), 0, recorder)
    return state, recorder


@pytest.fixture(scope="module")
def one_device(spread, split):
    state, recorder = run(spread, split)
    return jax.device_get(state), recorder


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_trains_the_single_device_network(
    spread, split, one_device, name
):
    state, recorder = run(override(spread, parallel=name), split)
    expected, expected_recorder = one_device
    assert swa_jax.swa_state(state.opt_state).num_averaged == 4
    # Parameters, running statistics, momentum, the average and the counters.
    chex.assert_trees_all_close(state, expected, rtol=0, atol=ATOL)
    # Every epoch's, as hooks see them; and every step's metrics.
    chex.assert_trees_all_close(
        recorder.averages, expected_recorder.averages, rtol=0, atol=ATOL
    )
    np.testing.assert_allclose(recorder.losses, expected_recorder.losses, atol=ATOL)


def test_unsynchronised_statistics_differ(spread, split, one_device):
    """So the agreement above is the synchronisation's doing."""
    expected, _ = one_device
    state = jax.device_get(unsynchronised_run(spread, split, "pmap"))
    first, last = (jax.tree.map(lambda x, d=d: x[d], state) for d in (0, 7))
    for own in (first, last):
        assert largest_difference(own.params, expected.params) > 1000 * ATOL
        assert largest_difference(own.batch_stats, expected.batch_stats) > 1000 * ATOL
    # The weights stay the same everywhere, the statistics do not.
    chex.assert_trees_all_equal(first.params, last.params)
    assert largest_difference(first.batch_stats, last.batch_stats) > 1000 * ATOL


def test_shard_map_refuses_unsynchronised_statistics(spread, split):
    with pytest.raises(ValueError, match="out_specs which require replication"):
        unsynchronised_run(spread, split, "shard_map")


def unsynchronised_run(config, split, name):
    strategy = make_strategy(name, config.data.batch_size)
    arm = compile_arm(config, split, 4)
    optimizer = make_optimizer(config.optimizer, arm.arm, 2, statistics(arm))
    train_step = make_train_step(config.network, optimizer, strategy.axis_name)
    step = strategy.compile(train_step)
    state = strategy.place_state(arm.init(jax.random.key(0)))
    for batch in train_batches(split, config, 0, last_step=STEPS):
        state, _ = step(state, strategy.place_batch(batch))
    return state


@functools.cache  # jax 0.8 has no way to take a single listener back
def compilations():
    """The durations of all XLA compilations from the first call on."""
    seen = []

    def listen(event, duration_secs, **kwargs):
        del kwargs
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seen


@pytest.mark.parametrize("name", ["none", *STRATEGIES])
def test_step_is_compiled_once_and_donates(spread, split, name):
    config = override(spread, parallel=name)
    chex.clear_trace_counter()
    strategy = make_strategy(name, config.data.batch_size)
    arm = compile_arm(config, split, 4)
    step = make_train_step(
        config.network.clone(axis_name=strategy.axis_name),
        make_optimizer(config.optimizer, arm.arm, 2, statistics(arm)),
        strategy.axis_name,
    )
    states = [strategy.place_state(arm.init(jax.random.key(s))) for s in range(2)]
    batches = list(
        map(strategy.place_batch, train_batches(split, config, 0, last_step=STEPS))
    )
    compiled = strategy.compile(chex.assert_max_traces(step, n=1))
    before = len(compilations())
    for state in states:  # a second seed starts from a fresh state
        for batch in batches[:4]:
            old, (state, _) = state, compiled(state, batch)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    jax.block_until_ready(state)
    assert len(compilations()) - before == 1
    # In place, on every device: the buffers that came in are those that come out.
    where = buffers(state)
    state, _ = compiled(state, batches[4])
    assert buffers(state) == where


def buffers(state):
    return {
        shard.data.unsafe_buffer_pointer()
        for leaf in jax.tree.leaves(state)
        for shard in leaf.addressable_shards
    }


@pytest.mark.parametrize("name", STRATEGIES)
def test_batch_must_be_shared_equally(spread, split, name):
    config = override(spread, parallel=name, batch_size=20)
    with pytest.raises(
        DevicesError,
        match=rf"batch_size is 20 on 8 devices; under --parallel {name} .*"
        r"--batch-size 24\.",
    ):
        compile_arm(config, split, 4)


def test_one_device_in_a_job_of_several_processes_is_an_error(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(DevicesError, match=r"parallel is none in a job of 2 processes"):
        make_strategy("none", 16)


@pytest.fixture(scope="module")
def averaged(spread, one_device):
    """Averaged weights, stale statistics, and the single-device BatchNorm pass."""
    state, _ = one_device
    return averaged_variables(state)[0], state.batch_stats


def one_device_pass(config, averaged, images):
    fn = make_batch_stats_fn(config.network)
    params, stats = averaged
    return swa_jax.recompute_batch_stats(fn, params, stats, images)


def test_batch_norm_pass_over_sharded_batches(spread, split, averaged):
    images = [split.examples.inputs[:16], split.examples.inputs[4:20]]
    mesh = jax.make_mesh((8,), (AXIS_NAME,), axis_types=(jax.sharding.AxisType.Auto,))
    rows, replicated = (
        NamedSharding(mesh, spec)
        for spec in (PartitionSpec(AXIS_NAME), PartitionSpec())
    )
    fn = make_batch_stats_fn(spread.network)
    params, stats = jax.device_put(averaged, replicated)
    found = swa_jax.recompute_batch_stats(
        fn, params, stats, jax.device_put(images, rows)
    )
    expected = one_device_pass(spread, averaged, images)
    chex.assert_trees_all_close(found, expected, rtol=0, atol=ATOL)
    assert largest_difference(found, averaged[1]) > 1000 * ATOL


def test_batch_norm_pass_under_pmap(spread, split, averaged):
    images = [split.examples.inputs[:16], split.examples.inputs[4:20]]
    fn = make_batch_stats_fn(spread.network.clone(axis_name=AXIS_NAME))
    everywhere = make_strategy("pmap", 16)
    params, stats = everywhere.place_state(averaged)
    found = swa_jax.recompute_batch_stats(
        fn,
        params,
        stats,
        map(everywhere.place_batch, images),
        axis_name=AXIS_NAME,
    )
    expected = one_device_pass(spread, averaged, images)
    for device in range(8):
        own = jax.tree.map(lambda x, d=device: x[d], jax.device_get(found))
        chex.assert_trees_all_close(own, expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", ["pmap", "shard_map"])
def test_gradients_are_means_not_sums(name):
    """A closed form: the gradient of mean(w x) is mean(x), on every device."""
    strategy = make_strategy(name, 16)

    def step(w, x):
        own = parallel.per_device(w, strategy.axis_name)
        gradient = jax.grad(lambda w: jnp.mean(w * x))(own)
        return w, parallel.mean_over(gradient, strategy.axis_name)

    _, gradient = strategy.compile(step)(
        strategy.place_state(jnp.ones([])),
        strategy.place_batch(np.arange(16, dtype=np.float32)),
    )
    assert gradient == 7.5
