"""Trees, averages and stores that ``test_any_order`` puts a run together from."""

import dataclasses
import functools
import pickle
from collections.abc import Callable
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import swa_jax

from .reference import Definition, Schedule, is_floating, precision, width_of

# Trees.


@dataclasses.dataclass(frozen=True)
class Kind:
    """A leaf: how it is made, and what of."""

    dtype: str
    shape: tuple[int, ...] = ()
    made: type = jax.Array  # or np.ndarray, float, int

    def value(self, rng: np.random.Generator, scale: float) -> Any:
        """Numbers of about this size, if they are floating."""
        if self.dtype == "key":
            return jax.random.key(int(rng.integers(2**31)))
        dtype = jnp.dtype(self.dtype)
        x: np.ndarray
        if is_floating(dtype):
            x = rng.normal(size=self.shape) * scale
            limit = float(precision(dtype).max) / 4
            x = np.clip(x, -limit, limit)
            if dtype.kind == "c":
                x = x + 1j * scale * rng.normal(size=self.shape)
        else:
            x = rng.integers(0, 2 if dtype.kind == "b" else 100, size=self.shape)
        x = np.asarray(x).astype(dtype)
        if self.made is jax.Array:
            return jnp.asarray(x)
        return x if self.made is np.ndarray else self.made(x)


F32, BF16, F16 = (Kind(name, (3,)) for name in ("float32", "bfloat16", "float16"))
WIDE = Kind("float32", (8, 2))  # divides by eight devices
SCALAR, COUNT = Kind("float32"), Kind("int32")
EMPTY, KEY = Kind("float32", (0, 2)), Kind("key")
HIDDEN = optax.MaskedNode()

#: What a run may train: few, for each is compiled for each average.
LAYOUTS: list[Any] = [
    {"w": WIDE, "b": F32},
    {"dense": {"kernel": Kind("bfloat16", (8, 2)), "bias": F32}, "rest": None},
    (F16, [SCALAR, COUNT]),
    SCALAR,
    {"empty": EMPTY, "w": F32, "hidden": HIDDEN},
    {},
    {
        "double": Kind("float64", (3,), np.ndarray),
        "long": Kind("int64", (2,), np.ndarray),
        "number": Kind("float32", (), float),
        "integer": Kind("int32", (), int),
    },
    {
        "f8": Kind("float8_e4m3fn", (3,)),
        "c": Kind("complex64", (2,)),
        "flag": Kind("bool", (2,)),
        "byte": Kind("uint8", (8,)),
    },
    {"key": KEY, "w": WIDE},
    [None, (Kind("bfloat16"),), {"steps": Kind("int32", (8,))}],
    {"step": COUNT},
    {"a": WIDE, "b": {"a": BF16, "b": (F16, None, HIDDEN)}},
]

KINDS = [WIDE, F32, BF16, F16, SCALAR, COUNT, EMPTY, Kind("bfloat16", (8, 2))]
KINDS += [Kind("complex64", (2,)), Kind("float64", (3,), np.ndarray)]


def any_layout() -> st.SearchStrategy[Any]:
    """Trees of any form, each of which has to be compiled."""

    def around(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=2).map(tuple),
            st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        )

    leaves = st.sampled_from([*KINDS, None, HIDDEN])
    return st.recursive(leaves, around, max_leaves=4)


def kinds(layout: Any) -> list[Kind]:
    return jax.tree.leaves(layout)


def is_key(x: Any) -> bool:
    keys = jax.dtypes.prng_key
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, keys)


def make(layout: Any, seed: int, scale: float = 1.0) -> Any:
    """Parameters of this layout."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda kind: kind.value(rng, scale), layout)


def stored(tree: Any) -> list[np.ndarray]:
    """The leaves as arrays of JAX hold them, 64-bit types being off."""

    def one(x: Any) -> np.ndarray:
        if is_key(x):
            x = jax.random.key_data(x)
        x = np.asarray(x)
        narrower = {
            "float64": np.float32,
            "int64": np.int32,
            "complex128": np.complex64,
        }
        return x.astype(narrower.get(x.dtype.name, x.dtype))

    return list(map(one, jax.tree.leaves(tree)))


# Averages.


def mean_decay(n: Any) -> Any:
    """A decay of one's own: with it, every model counts the same."""
    return 1 - 1 / n


@dataclasses.dataclass(frozen=True)
class Method:
    """An average, and its definition in float64."""

    make: Callable[..., optax.GradientTransformationExtraArgs]
    state: type
    definition: Definition
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)


METHODS = {
    "swa": Method(swa_jax.swa, swa_jax.SWAState, Definition()),
    "compensated": Method(
        swa_jax.swa,
        swa_jax.CompensatedSWAState,
        Definition(compensated=True),
        {"compensated": True},
    ),
    "ema": Method(
        swa_jax.ema,
        swa_jax.EMAState,
        Definition(lambda n: 0.3 / (1 - 0.7**n)),
        {"decay": 0.7},
    ),
    "ema without correction": Method(
        swa_jax.ema,
        swa_jax.EMAState,
        Definition(lambda n: 0.1),
        {"decay": 0.9, "debias": False},
    ),
    "ema with warm-up": Method(
        swa_jax.ema,
        swa_jax.EMAState,
        Definition(lambda n: max(0.1, n**-0.75)),
        {"decay": swa_jax.ema_warmup(0.9, power=0.75)},
    ),
    "ema by a function": Method(
        swa_jax.ema, swa_jax.EMAState, Definition(), {"decay": mean_decay}
    ),
    "power ema": Method(
        swa_jax.power_ema,
        swa_jax.PowerEMAState,
        Definition(lambda n: 1 - (1 - 1 / n) ** 3.5),
        {"gamma": 2.5},
    ),
    "power ema by width": Method(
        swa_jax.power_ema,
        swa_jax.PowerEMAState,
        Definition(lambda n: 1 - (1 - 1 / n) ** (width_of(0.1) + 1)),
        {"sigma_rel": 0.1},
    ),
    "lawa": Method(
        swa_jax.lawa, swa_jax.LAWAState, Definition(window=3), {"window": 3}
    ),
    "lawa of one": Method(
        swa_jax.lawa, swa_jax.LAWAState, Definition(window=1), {"window": 1}
    ),
    "swag": Method(swa_jax.swag, swa_jax.SWAGState, Definition(rank=3), {"rank": 3}),
    "swag, diagonal": Method(
        swa_jax.swag, swa_jax.SWAGState, Definition(rank=0), {"rank": 0}
    ),
}
#: States with the same fields, by which a checkpoint is restored.
ALIKE = (swa_jax.SWAState, swa_jax.EMAState, swa_jax.PowerEMAState)


def spread(leaf: jax.ShapeDtypeStruct) -> Sharding | None:
    """Over all devices, if it divides: a rule as users write it."""
    return home(leaf.shape, "eight")


#: Options of averages, by a name; those of the first three differ in when alone.
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "period": {"start_step": 3, "period": 2},
    "to an end": {"start_step": 2, "stop_step": 9, "skip_nonfinite": True},
    "bfloat16": {"accumulator_dtype": jnp.bfloat16, "skip_nonfinite": True},
    "float16": {"accumulator_dtype": jnp.float16, "start_step": 1, "period": 3},
    "spread": {"sharding": spread},
}
#: What a run may be restored with instead of each other.
SCHEDULES = ["default", "period", "to an end"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """An average with its options, and how it is driven.

    Attributes:
      method: its name.
      options: their name.
      form: in an optax ``chain``, ``along`` with statistics, or in a ``loop``.
    """

    method: str
    options: str = "default"
    form: str = "chain"

    @property
    def definition(self) -> Definition:
        return METHODS[self.method].definition

    @property
    def state(self) -> type:
        return METHODS[self.method].state

    @property
    def spread(self) -> bool:
        """Whether the step itself puts the average on all devices."""
        return self.form != "loop" and "sharding" in OPTIONS[self.options]

    @property
    def accumulator(self) -> Any:
        return OPTIONS[self.options].get("accumulator_dtype")

    @property
    def schedule(self) -> Schedule:
        apart = ("accumulator_dtype", "sharding")
        options = OPTIONS[self.options].items()
        return Schedule(**{name: x for name, x in options if name not in apart})

    @functools.cache  # noqa: B019 - settings are few, and programs are kept with them
    def average(self) -> optax.GradientTransformationExtraArgs:
        method = METHODS[self.method]
        average = method.make(**method.arguments, **OPTIONS[self.options])
        if self.form == "along":
            average = swa_jax.with_batch_stats(average, STATISTICS)
        return average

    @functools.cache  # noqa: B019
    def tx(self) -> optax.GradientTransformationExtraArgs:
        return optax.chain(optax.identity(), self.average())

    @functools.cache  # noqa: B019
    def step(self, how: str) -> Callable[..., Any]:
        """A training step, compiled or not: parameters and state after it."""

        def step(params: Any, state: Any, updates: Any, stats: Any) -> Any:
            more = {"batch_stats": stats} if self.form == "along" else {}
            updates, state = self.tx().update(updates, state, params, **more)
            return jax.tree.map(apply, params, updates), state

        if how == "eager":
            return step
        return jax.jit(step, donate_argnums=1 if how == "donated" else ())


STATISTICS = {"mean": np.zeros(3, np.float32), "var": np.ones(3, np.float32)}


def apply(param: Any, update: Any) -> Any:
    """What the user stores; keys have no gradient."""
    return param if update is None else optax.apply_updates(param, update)


def towards(params: Any, target: Any) -> Any:
    """Updates that take parameters there, but for rounding."""

    def one(param: Any, goal: Any) -> Any:
        if is_key(param):
            return None
        old, new = stored(param)[0], stored(goal)[0]
        if old.dtype == bool:
            return new
        if not is_floating(old.dtype):
            return (new - old).astype(old.dtype)
        wide = np.complex128 if old.dtype.kind == "c" else np.float64
        with np.errstate(invalid="ignore"):
            return (new.astype(wide) - old.astype(wide)).astype(old.dtype)

    return jax.tree.map(one, params, target)


# Places.

#: On no device in particular, on one that is not the first, over two, over all eight.
PLACES = ["free", "third", "two", "eight"]


@functools.cache
def home(shape: tuple[int, ...], place: str) -> Sharding | None:
    """Where a leaf of this shape lives, or a stack of such leaves."""
    if place == "free":
        return None
    if place == "third":
        return SingleDeviceSharding(jax.devices()[3])
    mesh = Mesh(np.array(jax.devices()[: {"two": 2, "eight": 8}[place]]), ("x",))
    # No leaf has eight of anything but in front, and no stack has so many rows.
    divides = [axis for axis, size in enumerate(shape[:2]) if size == 8]
    return NamedSharding(mesh, P(*(None,) * divides[0], "x") if divides else P())


def moved(tree: Any, place: str) -> Any:
    """A tree that lives there; as it is, if it is free to live anywhere."""
    if place == "free":
        return tree
    return jax.tree.map(lambda x: jax.device_put(x, home(np.shape(x), place)), tree)


# Stores.


def abstract(tree: Any, place: str) -> Any:
    """What Orbax shall restore, and where."""

    def one(x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return x
        at = home(np.shape(x), place) or SingleDeviceSharding(jax.devices()[0])
        return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=at)

    return jax.tree.map(one, tree)


@functools.cache
def checkpointer() -> orbax.checkpoint.StandardCheckpointer:
    return orbax.checkpoint.StandardCheckpointer()


def write(store: str, path: Any, tree: Any) -> None:
    """Saves to a path where nothing is."""
    if store == "orbax":
        checkpointer().save(path, tree)
        checkpointer().wait_until_finished()
    elif store == "msgpack":
        path.write_bytes(flax.serialization.to_bytes(tree))
    else:
        path.write_bytes(pickle.dumps(jax.device_get(tree)))


def read(store: str, path: Any, target: Any) -> Any:
    """Restores into the structure of another run's state."""
    if store == "orbax":
        return checkpointer().restore(path, target)
    if store == "msgpack":
        return flax.serialization.from_bytes(target, path.read_bytes())
    return pickle.loads(path.read_bytes())


def stores(layout: Any) -> list[str]:
    """Those that can hold such a tree: each has leaves of its own that it refuses."""
    found = kinds(layout)
    if KEY in found:
        return ["orbax"]  # msgpack and pickle take no keys
    if any(0 in kind.shape for kind in found):
        return ["msgpack", "pickle"]  # Orbax takes no empty arrays
    return ["msgpack", "pickle", "orbax"]
