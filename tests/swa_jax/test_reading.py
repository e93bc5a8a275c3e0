"""``swa_state``, ``swa_params``, ``with_num_updates``: finding an average, using it.

Oracles are weights whose mean is known exactly, and NumPy float64.
"""

import functools
import warnings
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import swa_jax

from .test_transform import PARAMS, bits, follow
from .transformations import structure

#: The default run takes two cases of each test here, see conftest.py.
pytestmark = pytest.mark.sample(2)

# Where the state is found.


def test_swa_state_in_plain_containers():
    state = swa_jax.swa().init({"w": jnp.ones(2)})
    for nested in (state, (None, state), {"a": [1, (state,), None]}):
        assert swa_jax.swa_state(nested) == state


@pytest.mark.parametrize(
    "opt_state", [(), None, optax.adam(0.1).init(jnp.ones(2)), {"w": jnp.ones(2)}]
)
def test_no_state_is_an_error(opt_state):
    name = type(opt_state).__name__
    message = rf"opt_state \(a {name}\) holds no SWAState; chain swa_jax.swa\("
    with pytest.raises(ValueError, match=message):
        swa_jax.swa_state(opt_state)
    with pytest.raises(ValueError, match=message):
        swa_jax.swa_params(opt_state, jnp.ones(2))


def test_several_states_are_an_error():
    params = {"w": jnp.ones(2)}
    tx = optax.chain(swa_jax.swa(), optax.named_chain(("late", swa_jax.swa(9))))
    message = (
        r"holds 2 SWAStates, where one was expected: SWAState at opt_state\[0\], "
        r"SWAState at opt_state\[1\]\['late'\]; .*which=.*pass the part"
    )
    with pytest.raises(ValueError, match=message):
        swa_jax.swa_state(tx.init(params))
    with pytest.raises(ValueError, match=message):
        swa_jax.swa_params(tx.init(params), params)
    assert swa_jax.swa_state(tx.init(params)[1]).num_updates == 0
    late = swa_jax.with_num_updates(tx.init(params), 5, "late")
    assert [int(s.num_updates) for s in (late[0], late[1]["late"])] == [0, 5]


def test_of_many_states_three_are_named():
    states = [swa_jax.swa().init(jnp.ones(2))] * 9
    message = (
        r"holds 9 SWAStates.*: SWAState at opt_state\[0\], .*\[1\], .*\[2\] and 6 "
        r"more; .*pass"
    )
    with pytest.raises(ValueError, match=message):
        swa_jax.swa_state(states)


def test_swapped_arguments():
    params = {"w": jnp.ones(2)}
    with pytest.raises(
        ValueError, match=r"swapped, call swa_params\(opt_state, params"
    ):
        swa_jax.swa_params(params, optax.chain(swa_jax.swa()).init(params))


def as_dicts(tree):
    """What msgpack makes of a state: names of fields, and numbers as strings."""
    if isinstance(tree, tuple):
        names = getattr(tree, "_fields", map(str, range(len(tree))))
        return {name: as_dicts(x) for name, x in zip(names, tree, strict=True)}
    return tree


def as_lists(tree):
    """What Orbax makes of it: dicts for NamedTuples, lists for tuples."""
    if isinstance(tree, tuple) and hasattr(tree, "_asdict"):
        return {name: as_lists(x) for name, x in tree._asdict().items()}
    return [as_lists(x) for x in tree] if isinstance(tree, tuple) else tree


@pytest.mark.parametrize(
    ("lose", "path"), [(as_dicts, r"\['1'\]"), (as_lists, r"\[1\]")]
)
@pytest.mark.parametrize("params", [{"w": jnp.ones(2)}, {}], ids=["some", "empty"])
def test_a_state_that_has_lost_its_structure(lose, path, params):
    opt_state = lose(optax.chain(optax.adam(0.1), swa_jax.swa()).init(params))
    message = (
        rf"has the fields of an average at opt_state{path}, but not its type.*Fix: "
        r"restore the checkpoint into the structure of tx.init\(params\)"
    )
    for use in (
        swa_jax.swa_state,
        lambda state: swa_jax.swa_params(state, params),
        lambda state: swa_jax.with_num_updates(state, 3),
    ):
        with pytest.raises(ValueError, match=message):
            use(opt_state)


# Where it must stand.


def inner(swa):
    """Links inside links, as deep as they come."""
    return optax.MultiSteps(
        optax.chain(optax.masked(optax.chain(optax.sgd(0.1), swa), {"w": True})), 2
    ).gradient_transformation()


@pytest.mark.parametrize(
    ("make", "later", "part"),
    [
        (lambda swa: optax.chain(swa, optax.sgd(0.1)), "[1]", "[0]"),
        (lambda swa: optax.chain(swa, optax.scale(-0.1)), "[1]", "[0]"),
        (lambda swa: optax.chain(swa, optax.identity()), "[1]", "[0]"),
        (lambda swa: optax.chain(swa, swa_jax.swa(), optax.adam(1)), "[2]", "[0]"),
        (lambda swa: optax.chain(swa, optax.chain(optax.sgd(1), swa)), "[1]", "[0]"),
        (lambda swa: optax.chain(optax.chain(swa), optax.trace(0.9)), "[1]", "[0]"),
        (
            lambda swa: optax.chain(optax.chain(swa, optax.trace(0.9))),
            "[0][1]",
            "[0][0]",
        ),
        (
            lambda swa: optax.named_chain(("z", swa), ("a", optax.sgd(0.1))),
            "['a']",
            "['z']",
        ),
        (lambda swa: optax.chain(inner(swa), optax.scale(2.0)), "[1]", "[0]"),
        (
            lambda swa: optax.chain(optax.masked(swa, {"w": True}), optax.scale(2.0)),
            "[1]",
            "[0]",
        ),
        (
            lambda swa: optax.inject_hyperparams(
                lambda rate: optax.chain(swa, optax.sgd(rate))
            )(rate=0.1),
            ".inner_state[1]",
            ".inner_state[0]",
        ),
        (
            lambda swa: optax.chain(
                swa, optax.GradientTransformation(lambda p: (), lambda u, s, p: (u, s))
            ),
            "[1]",
            "[0]",
        ),
    ],
)
@pytest.mark.parametrize("jit", [False, True])
def test_swa_that_is_not_last_is_refused(make, later, part, jit):
    params = {"w": jnp.ones(2)}
    opt_state = make(swa_jax.swa()).init(params)
    if jit:
        opt_state = jax.jit(lambda state: state)(opt_state)
    for use in (
        swa_jax.swa_state,
        lambda state: swa_jax.swa_params(state, params),
        lambda state: swa_jax.with_num_updates(state, 3),
    ):
        with pytest.raises(ValueError, match=r"put swa\(\) last") as error:
            use(opt_state)
        message = str(error.value)
        assert message.startswith(f"opt_state{later} (a ")
        assert f" follows opt_state{part}, which" in message
        assert message.endswith(f"pass opt_state{part}")


def masked_later():
    return optax.masked(swa_jax.swa(2), {"w": True})


@pytest.mark.parametrize(
    "later",
    [
        swa_jax.swa,
        masked_later,
        lambda: optax.chain(swa_jax.swa(2), masked_later()),
        lambda: optax.named_chain(("late", swa_jax.swa(2))),
        lambda: optax.inject_hyperparams(swa_jax.swa)(2),
    ],
)
def test_an_average_may_follow_another(later):
    params = {"w": jnp.ones(2)}
    opt_state = optax.chain(optax.sgd(0.1), swa_jax.swa(), later()).init(params)
    with pytest.raises(ValueError, match=r"holds [23] SWAStates"):
        swa_jax.swa_state(opt_state)
    assert swa_jax.swa_state(opt_state[1]).num_updates == 0


def test_optimizers_in_a_tuple_of_ones_own():
    # Its way out is in the message: pass the part.
    params = {"w": jnp.ones(2)}
    generator = optax.chain(optax.sgd(0.1), swa_jax.swa()).init(params)
    discriminator = optax.adam(0.1).init(params)
    with pytest.raises(ValueError, match=r"several optimizers, pass opt_state\[0\]$"):
        swa_jax.swa_state((generator, discriminator))
    for part in (generator, (discriminator, generator)):
        assert swa_jax.swa_state(part).num_updates == 0
    for container in (dict, list):  # no chain's state
        both = container(zip("gd", (generator, discriminator), strict=True))
        assert swa_jax.swa_state(both).num_updates == 0


def run(tx, params, steps=6, get=lambda params: params):
    """The weights after every step, and the last state."""
    history, opt_state = [], tx.init(params)
    for _ in range(steps):
        updates, opt_state = tx.update(get(params), opt_state, params)
        params = optax.apply_updates(params, updates)
        history.append(np.asarray(get(params)["w"], np.float64))
    return history, opt_state, params


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["schedule_free", "mechanize", "lookahead"])
def test_wrappers_that_rewrite_updates(wrapper):
    params, get = {"w": jnp.array([1.0, -2.0])}, lambda params: params
    if wrapper == "lookahead":
        params, get = optax.LookaheadParams.init_synced(params), lambda p: p.fast
    wrap = {
        "schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.1),
        "mechanize": optax.contrib.mechanize,
        "lookahead": lambda tx: optax.lookahead(tx, 3, 0.5),
    }[wrapper]
    inside = wrap(optax.chain(optax.sgd(0.1), swa_jax.swa()))
    history, opt_state, params = run(inside, params, get=get)
    leaves = jax.tree.leaves(
        opt_state, is_leaf=lambda x: isinstance(x, swa_jax.SWAState)
    )
    (seen,) = (x for x in leaves if isinstance(x, swa_jax.SWAState))
    mean = jax.tree.leaves(seen.avg_params)[0]
    assert np.abs(mean - np.mean(history, 0)).max() > 0.01  # a real mistake
    with pytest.raises(ValueError, match=r"opt_state is a \w+State.*put swa.. behind"):
        swa_jax.swa_params(opt_state, get(params))
    # The fix that it names.
    around = optax.chain(wrap(optax.sgd(0.1)), swa_jax.swa())
    history, opt_state, params = run(around, params, get=get)
    mean = get(swa_jax.swa_params(opt_state, params))["w"]
    np.testing.assert_allclose(mean, np.mean(history, 0), rtol=1e-6)


# Values.


@pytest.mark.parametrize("jit", [False, True])
def test_swa_params_before_and_after_the_first_model(jit):
    eager = functools.partial(swa_jax.swa_params, allow_empty=True)
    read = jax.jit(eager) if jit else eager
    tx = swa_jax.swa(start_step=2)
    models = [{"w": np.array([x, 0.25, np.nan], np.float32)} for x in (1, 2, 4)]
    states = follow(tx.init(models[0]), tx, models)
    assert bits(read(tx.init(models[0]), models[0])) == bits(models[0])
    assert bits(read(states[0], models[0])) == bits(models[0])
    assert bits(read(states[1], models[0])) == bits(models[1])
    expected = {"w": np.array([3, 0.25, np.nan], np.float32)}
    chex.assert_trees_all_equal(read(states[2], models[0]), expected)
    negative_zero = {"w": -np.zeros(3, np.float32)}
    assert bits(read(tx.init(models[0]), negative_zero)) == bits(negative_zero)


def test_swa_params_have_the_params_dtypes():
    dtypes = [jnp.bfloat16, jnp.float16, jnp.float8_e5m2, jnp.float32, jnp.complex64]
    params = {jnp.dtype(dtype).name: jnp.ones((2, 2), dtype) for dtype in dtypes}
    params["weak"] = jnp.asarray(1.0)
    tx = swa_jax.swa()
    models = [params, jax.tree.map(lambda x: x + x + x, params)]
    state = follow(tx.init(params), tx, models)[-1]
    read = swa_jax.swa_params(state, params)
    expected = jax.tree.map(lambda x: x + x, params)  # the mean of 1 and 3
    chex.assert_trees_all_equal(read, expected)
    chex.assert_trees_all_equal_dtypes(read, expected)


def pointers(tree) -> set[int]:
    """Where every buffer of a tree lies, those of PRNG keys included."""
    arrays = (
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in jax.tree.leaves(tree)
    )
    shards = (shard.data for x in arrays for shard in x.addressable_shards)
    return {shard.unsafe_buffer_pointer() for shard in shards if shard.size}


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("num_averaged", [0, 3])
@pytest.mark.parametrize("jit", [False, True])
def test_swa_params_share_no_buffer(num_averaged, jit, hidden):
    eager = functools.partial(swa_jax.swa_params, allow_empty=True)
    read = jax.jit(eager) if jit else eager
    mesh = jax.make_mesh((8,), ("x",), (jax.sharding.AxisType.Auto,))
    over = jax.sharding.NamedSharding(mesh, P("x"))
    layer = {
        "w": jnp.ones(64),
        "h": jnp.ones(64, jnp.bfloat16),
        "n": jnp.arange(3),
        "spread": jnp.ones(64),
        "weak": jnp.asarray(1.0),
        "empty": jnp.ones((0, 2)),
    }
    params: dict[str, Any] = {"layer": layer, "other": jnp.ones(64)}
    params = jax.device_put(params, jax.sharding.NamedSharding(mesh, P()))
    params["layer"]["spread"] = jax.device_put(params["layer"]["spread"], over)
    tx = optax.masked(swa_jax.swa(), {"layer": not hidden, "other": True})
    state = tx.init(params)
    for _ in range(num_averaged):
        _, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    average = read(state, params)
    assert not pointers(average) & pointers((state, params))
    chex.assert_trees_all_equal_shapes_and_dtypes(average, params)
    spread = average["layer"]["spread"].sharding
    assert spread.is_equivalent_to(over, 1)
    # State and parameters go on, in place; what was read stays as it was.
    kept = jax.device_get(params)
    donated = jax.jit(lambda s: jax.tree.map(lambda x: 0 * x, s), donate_argnums=0)
    donated((state, params))
    chex.assert_trees_all_equal(jax.device_get(average), kept)


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("num_averaged", [0, 1])
def test_prng_keys_share_no_buffer(num_averaged, hidden):
    params = {"key": jax.random.split(jax.random.key(3), 4)}
    state = swa_jax.init_average(params)
    if num_averaged:
        state = swa_jax.update_average(state, params)
    if hidden:
        state = state._replace(avg_params={"key": optax.MaskedNode()})
    average = swa_jax.swa_params(state, params, allow_empty=True)

    def pointer(key: Any) -> int:
        return key._base_array.unsafe_buffer_pointer()

    kept = jax.tree.leaves((state.avg_params, params))
    assert not {*map(pointer, average.values())} & {*map(pointer, kept)}
    chex.assert_trees_all_equal(
        jax.random.key_data(average["key"]), jax.random.key_data(params["key"])
    )


def test_swa_params_do_not_touch_the_state():
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    state = swa_jax.update_average(swa_jax.init_average(params), params)
    before = bits(state)
    swa_jax.swa_params(state, params)
    assert not any(x.is_deleted() for x in jax.tree.leaves((state, params)))
    assert bits(state) == before


def test_swa_params_ignore_the_values_of_params():
    params = {"w": jnp.ones(4)}
    state = swa_jax.update_average(swa_jax.init_average(params), params)
    read = swa_jax.swa_params(state, {"w": jnp.full(4, jnp.nan)})
    chex.assert_trees_all_equal(read, params)


def test_swa_params_with_abstract_shapes():
    # As for restoring a checkpoint: nothing is computed.
    params = {"w": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)}
    state = jax.eval_shape(swa_jax.init_average, params)
    assert state.avg_params["w"].dtype == jnp.float32
    read = jax.eval_shape(swa_jax.swa_params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(read, params)


@pytest.mark.parametrize("wrap", [jax.vmap, jax.pmap])
def test_leading_axes(wrap):
    # Four runs, of which each has come so far: 0, 1, 2 or 3 models averaged.
    params = {"w": jnp.arange(8.0).reshape(4, 2), "h": jnp.ones((4, 3), jnp.bfloat16)}
    tx = optax.chain(optax.sgd(0.1), swa_jax.swa())
    opt_state = wrap(tx.init)(params)
    state = swa_jax.swa_state(opt_state)
    state = state._replace(
        num_averaged=jnp.arange(4, dtype=jnp.int32),
        avg_params={"w": 10 + params["w"], "h": jnp.full((4, 3), 5.0)},
    )
    warned = r"num_updates=0, num_averaged=0 to 3\)"
    with pytest.warns(UserWarning, match=warned):
        outside = swa_jax.swa_params(state, params)
    with jax.transfer_guard("disallow"):
        guarded = swa_jax.swa_params(state, params, allow_empty=True)
    inside = wrap(swa_jax.swa_params)(state, params)
    expected = {
        "w": np.array([[0, 1], [12, 13], [14, 15], [16, 17]], np.float32),
        "h": np.array([[1] * 3] + [[5] * 3] * 3, jnp.bfloat16),
    }
    for read in (outside, guarded, inside):
        chex.assert_trees_all_equal(jax.device_get(read), expected)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"a": jnp.ones((2, 3))},
            r"averages a parameter \['b'\]\['c'\], which params lacks",
        ),
        (
            {**PARAMS, "d": jnp.ones(())},
            r"for params\['d'\] of shape \(\) opt_state holds no average",
        ),
        (
            {**PARAMS, "a": jnp.ones((2, 1))},
            r"for params\['a'\] of shape \(2, 1\) .* an average of shape \(2, 3\)",
        ),
    ],
)
def test_swa_params_refuse_another_model(params, message):
    state = swa_jax.init_average(PARAMS)
    with pytest.raises(
        ValueError, match=rf"swa_params: .*{message}.*pass the parameters that the opt"
    ):
        swa_jax.swa_params(state, params)


@jax.tree_util.register_pytree_with_keys_class
class Twins:
    """A node that gives both its children one key, which JAX does not forbid."""

    def __init__(self, *children):
        self.children = children

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.GetAttrKey("x"), x) for x in self.children], None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


@pytest.mark.parametrize("hide", [None, 0, 1])
def test_leaves_with_one_path_are_told_apart(hide):
    params = Twins(jnp.ones(2), jnp.full(2, 5.0))
    state = swa_jax.update_average(swa_jax.init_average(params), params)
    average = [x + 10 for x in state.avg_params.children]
    expected = [11.0, 15.0]
    if hide is not None:
        average[hide], expected[hide] = optax.MaskedNode(), [1.0, 5.0][hide]
    read = swa_jax.swa_params(state._replace(avg_params=Twins(*average)), params)
    assert [x.tolist() for x in read.children] == [[x] * 2 for x in expected]


def test_leaves_with_one_path_are_refused_where_they_cannot_be_told_apart():
    params = Twins({"a": jnp.ones(2)}, {"a": jnp.full(2, 5.0)})
    state = swa_jax.update_average(swa_jax.init_average(params), params)
    half = Twins(optax.MaskedNode(), state.avg_params.children[1])
    for average, weights in (
        (half, params),
        (state.avg_params, Twins(params.children[0])),
        (Twins(params.children[0]), params),
    ):
        with pytest.raises(ValueError, match=r"one path names two leaves.*pass the p"):
            swa_jax.swa_params(state._replace(avg_params=average), weights)


def test_eager_reading_makes_no_hidden_transfer():
    params = {"w": jnp.ones(4, jnp.bfloat16), "n": np.arange(3), "hidden": jnp.ones(2)}
    tx = optax.masked(swa_jax.swa(), {"w": True, "n": True, "hidden": False})
    empty = tx.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    _, state = jax.jit(tx.update)(zeros, empty, params)
    with jax.transfer_guard("disallow"):
        assert isinstance(swa_jax.swa_state(state), swa_jax.SWAState)
        moved = swa_jax.with_num_updates(state, 7)
        read = [swa_jax.swa_params(each, params) for each in (state, moved)]
        read.append(swa_jax.swa_params(empty, params, allow_empty=True))
    for each in read:
        chex.assert_trees_all_equal(each, params)
        chex.assert_trees_all_equal_dtypes(each, jax.tree.map(jnp.asarray, params))


# Nothing averaged.


def trained(tx, steps):
    params = {"w": jnp.ones(2)}
    opt_state = tx.init(params)
    for _ in range(steps):
        _, opt_state = jax.jit(tx.update)(params, opt_state, params)
    return opt_state, params


@pytest.mark.parametrize(
    ("tx", "steps", "counted"),
    [
        (swa_jax.swa(start_step=9), 0, 0),
        (swa_jax.swa(start_step=9), 3, 3),
        (optax.MultiSteps(swa_jax.swa(start_step=4), 2), 6, 3),
    ],
    ids=["fresh", "early stop", "micro-batches"],
)
def test_a_warning_where_nothing_is_averaged(tx, steps, counted):
    opt_state, params = trained(tx, steps)
    message = (
        rf"swa_params: nothing has been averaged \(num_updates={counted}, "
        r"num_averaged=0\).*start_step.*MultiSteps.*with_num_updates.*allow_empty=True"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        read = swa_jax.swa_params(opt_state, params)
    assert [each.filename for each in caught] == [__file__]
    chex.assert_trees_all_equal(read, params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swa_jax.swa_params(opt_state, params, allow_empty=True)
        jax.jit(swa_jax.swa_params)(opt_state, params)  # the counters are unknown


def test_no_warning_once_a_model_is_averaged():
    opt_state, params = trained(swa_jax.swa(start_step=3), 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swa_jax.swa_params(opt_state, params)


# SWA for a run under way.


def momentum(*links):
    """SGD whose rate changes at every step, so that a lost count would show."""
    schedule = optax.linear_schedule(0.3, 0.1, 12)
    return optax.chain(optax.sgd(schedule, momentum=0.9), *links)


def go_on(tx, params, opt_state, steps):
    # Not compiled: XLA may round a step that averages otherwise than one that does not.
    for _ in range(steps):
        grads = jax.tree.map(lambda w: w - 3.0, params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    return params, opt_state


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [None, "multi_steps", "masked", "named", "inject"])
def test_swa_joins_a_run_under_way(wrap):
    """Six updates without, six with it: the bits of a run that had it throughout."""
    swa = swa_jax.swa(start_step=8, period=2)
    if wrap == "inject":
        swa = optax.inject_hyperparams(swa_jax.swa)(start_step=8, period=2)
    tx = {
        "multi_steps": lambda: optax.chain(
            momentum(), optax.MultiSteps(swa, 1).gradient_transformation()
        ),
        "masked": lambda: optax.chain(
            momentum(), optax.masked(swa, {"w": True, "b": False})
        ),
        "named": lambda: optax.named_chain(("0", momentum()), ("1", swa)),
    }.get(wrap, lambda: optax.chain(momentum(), swa))()
    start = {"w": jnp.array([1.0, -2.0]), "b": jnp.ones(())}
    whole = go_on(tx, start, tx.init(start), 12)

    plain = momentum()
    params, old = go_on(plain, start, plain.init(start), 6)
    fresh = tx.init(params)
    joined = {"0": old, "1": fresh["1"]} if wrap == "named" else (old, fresh[1])
    joined = type(fresh)(joined)
    joined = swa_jax.with_num_updates(joined, 6)
    assert structure(joined) == structure(fresh)
    params, opt_state = go_on(tx, params, joined, 6)
    assert bits((params, swa_jax.swa_state(opt_state))) == bits(
        (whole[0], swa_jax.swa_state(whole[1]))
    )
    assert int(swa_jax.swa_state(opt_state).num_averaged) == 3
    averages = [swa_jax.swa_params(s, p) for p, s in ((params, opt_state), whole)]
    assert bits(averages[0]) == bits(averages[1])


@pytest.mark.parametrize(
    "number",
    [5, np.int64(5), np.uint8(5), jnp.int32(5), jnp.uint32(5), np.array([5, 5])],
    ids=str,
)
@pytest.mark.parametrize("jit", [False, True])
def test_with_num_updates_keeps_all_else(number, jit):
    params = {"w": jnp.ones(2)}
    opt_state = optax.chain(optax.adam(0.1), swa_jax.swa()).init(params)
    if np.shape(number):
        opt_state = jax.tree.map(lambda x: jnp.stack([x, x]), opt_state)
    before = bits(opt_state)
    change = swa_jax.with_num_updates
    new = (jax.jit(change) if jit else change)(opt_state, number)
    assert bits(opt_state) == before
    chex.assert_trees_all_equal_shapes_and_dtypes(new, opt_state)
    state = swa_jax.swa_state(new)
    np.testing.assert_array_equal(state.num_updates, np.full(np.shape(number), 5))
    expected = swa_jax.swa_state(opt_state)._replace(num_updates=state.num_updates)
    assert bits(new) == bits((opt_state[0], expected))


@pytest.mark.parametrize("wrap", [jax.vmap, jax.pmap])
@pytest.mark.parametrize("how", ["outside", "inside"])
def test_with_num_updates_under_leading_axes(wrap, how):
    params = {"w": jnp.ones((4, 2))}
    opt_state = wrap(swa_jax.swa().init)(params)
    change = swa_jax.with_num_updates
    if how == "inside":
        new = wrap(change)(opt_state, np.arange(4, dtype=np.int32))
        expected = [0, 1, 2, 3]
    else:
        new, expected = change(opt_state, 3), [3] * 4
    np.testing.assert_array_equal(new.num_updates, expected)
    if how == "outside":
        assert new.num_updates.sharding == opt_state.num_updates.sharding
    update = wrap(swa_jax.swa().update)
    _, new = update(params, new, params)
    np.testing.assert_array_equal(new.num_updates, np.add(expected, 1))


def test_with_num_updates_leaves_the_counter_as_free_as_it_was():
    # Tied to one device, it could not meet parameters that live on another.
    params = jax.device_put(jnp.ones(2), jax.devices()[3])
    tx = optax.chain(optax.sgd(0.1), swa_jax.swa())
    opt_state = swa_jax.with_num_updates(tx.init(params), 5)
    _, opt_state = jax.jit(tx.update)(params, opt_state, params)
    assert int(swa_jax.swa_state(opt_state).num_updates) == 6
    committed = jax.device_put(swa_jax.swa().init(params), jax.devices()[3])
    moved = swa_jax.with_num_updates(committed, 5)
    assert moved.num_updates.sharding == committed.num_updates.sharding


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (-1, ValueError, r"between 0 and 2147483647 \(int32\), got -1"),
        (2**31, ValueError, "got 2147483648"),
        (2**70, TypeError, "int32 integer, got int"),
        (1.0, TypeError, "integer, got float of dtype float64"),
        (True, TypeError, "integer, got bool"),
        ("6", TypeError, "integer, got str"),
        (None, TypeError, "integer, got NoneType"),
        ([1, 2], TypeError, "integer, got list"),
        (jnp.ones(2, jnp.int32), ValueError, r"has shape \(2,\).* have \(\); pass one"),
        (jnp.float32(3), TypeError, "integer, got .* of dtype float32"),
    ],
    ids=str,
)
def test_with_num_updates_refuses(number, error, message):
    with pytest.raises(error, match=f"with_num_updates: num_updates.*{message}"):
        swa_jax.with_num_updates(swa_jax.swa().init(jnp.ones(2)), number)


def test_with_num_updates_averages_nothing_twice():
    state = trained(swa_jax.swa(start_step=3), 4)[0]
    with pytest.raises(ValueError, match=r"num_updates=3 is less than the 4 .*twice"):
        swa_jax.with_num_updates(state, 3)
    for number in (4, 100):
        assert int(swa_jax.with_num_updates(state, number).num_averaged) == 2
    empty = trained(swa_jax.swa(start_step=9), 4)[0]  # nothing is averaged: go back
    assert int(swa_jax.with_num_updates(empty, 0).num_updates) == 0
