"""Anything that may happen to a run, in any order, against float64.

A run trains, is saved, killed, restored with other settings or in another place, and
is given what it must refuse. ``reference.Ledger`` is told the same and says what the
average must be. The trees, averages and stores are those of ``hostile``.

    pytest -n0 -m slow tests/swa_jax/test_any_order.py --hypothesis-profile=release

is the run before a release: 10,000 examples instead of 300.
"""

import contextlib
import dataclasses
import itertools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import swa_jax

from .hostile import (
    ALIKE,
    KEY,
    LAYOUTS,
    METHODS,
    OPTIONS,
    PLACES,
    SCHEDULES,
    STATISTICS,
    Kind,
    Setting,
    abstract,
    any_layout,
    is_key,
    kinds,
    make,
    moved,
    read,
    stored,
    stores,
    towards,
    write,
)
from .reference import Ledger, exact, is_complex, is_floating, rounded
from .transformations import bits, structure, trees

SEEDS = st.integers(0, 2**16)
#: Of weights: far below 1, about 1, and as large as float16 can sum.
SCALES = st.sampled_from([1.0, 1.0, 0.0, 2.0**-12, 2.0**9])
BAD = st.sampled_from([np.nan, np.inf, -np.inf])
SAMPLES = [None, True, False, np.bool_(True), np.bool_(False)]
WRONG = [
    "shape",
    "another structure",
    "less",
    "more",
    "another kind of number",
    "text",
    "no values",
    "no params",
    "another average",
    "another size",
    "another accumulator",
    "a sample that is none",
    "updates of another shape",
    "updates of another structure",
    "a count from before",
    "a reader of another model",
]
RUNS = itertools.count(1)
FLOATS = ["float32", "bfloat16", "float16"]


class Run(RuleBasedStateMachine):
    """One run, and the books of what it did."""

    layouts: st.SearchStrategy[Any] = st.sampled_from(LAYOUTS)

    def __init__(self):
        super().__init__()
        self.place = "free"
        self.saved: list[tuple[str, pathlib.Path, Setting, Ledger, Any]] = []
        self.recent: list[Any] = []
        self.folder = contextlib.ExitStack()
        path = self.folder.enter_context(tempfile.TemporaryDirectory())
        self.path = pathlib.Path(path)

    @initialize(
        data=st.data(),
        method=st.sampled_from([*METHODS]),
        options=st.sampled_from([*["default"] * 4, *OPTIONS]),
        form=st.sampled_from(["chain", "loop", "along"]),
        seed=SEEDS,
    )
    def begin(self, data, method, options, form, seed):
        self.layout = data.draw(self.layouts, label="layout")
        if form == "along" and METHODS[method].state is swa_jax.SWAGState:
            form = "chain"
        if options == "float16" and METHODS[method].state is swa_jax.SWAGState:
            options = "bfloat16"  # squares of 512 are beyond float16
        if OPTIONS[options].get("sharding") and form == "along":
            options = "default"
        self.setting = Setting(method, options, form)
        self.restart(seed)

    def restart(self, seed: int = 0) -> None:
        """The run as it is before its first step."""
        self.place = "free"
        self.params = make(self.layout, seed)
        self.state = self.fresh(self.params)
        if self.form == "along":
            self.params = {"params": self.params, "batch_stats": STATISTICS}
        dtypes = [x.dtype for x in stored(self.params)]
        setting = self.setting
        self.ledger = Ledger(
            setting.definition, setting.schedule, dtypes, setting.accumulator
        )
        self.recent = []

    def fresh(self, params: Any) -> Any:
        if self.form == "loop":
            return swa_jax.init_average(params, self.setting.average())
        return self.setting.tx().init(params)

    @property
    def form(self) -> str:
        return self.setting.form

    @property
    def average(self) -> Any:
        """The average's own state."""
        return swa_jax.average_state(self.state, self.setting.state)

    def model(self, seed: int, scale: float) -> Any:
        """Weights that training might have come to, of the present dtypes."""
        target = make(self.layout, seed, scale)
        if self.form == "along":
            kind = Kind("float32", (3,), np.ndarray)
            stats = make(dict.fromkeys(STATISTICS, kind), seed + 1, scale)
            target = {"params": target, "batch_stats": stats}

        def like(param, goal):
            as_now = getattr(param, "dtype", None)
            floating = as_now is not None and jnp.issubdtype(as_now, jnp.inexact)
            if isinstance(goal, jax.Array) and floating:
                return goal.astype(as_now)
            return np.asarray(goal).astype(as_now) if floating else goal

        # What JAX made of NumPy's numbers stays JAX's, in a chain.
        return jax.tree.map(like, self.params, target)

    # What a run does.

    @rule(
        seed=SEEDS,
        scale=SCALES,
        how=st.sampled_from(["compiled", "compiled", "donated", "eager"]),
        sample=st.sampled_from(SAMPLES),
    )
    def step(self, seed, scale, how, sample):
        self.advance(self.model(seed, scale), how, sample)

    @rule(
        steps=st.integers(2, 5),
        seed=SEEDS,
        scale=SCALES,
        how=st.sampled_from(["compiled", "donated"]),
    )
    def some_steps(self, steps, seed, scale, how):
        for i in range(steps):
            self.advance(self.model(seed + i, scale), how)

    @rule(seed=SEEDS, bad=BAD, at=st.integers(0, 10), skip=st.booleans())
    def step_that_is_not_finite(self, seed, bad, at, skip):
        leaves, treedef = jax.tree.flatten(self.model(seed, 1.0))
        floats = [i for i, x in enumerate(stored(leaves)) if is_floating(x.dtype)]
        floats = [i for i in floats if np.size(leaves[i])]
        if not floats:
            return
        index = floats[at % len(floats)]
        x = np.array(leaves[index])
        if "float8" in x.dtype.name:
            bad = np.nan  # it has no infinity
        x.flat[at % x.size] = bad
        leaves[index] = jnp.asarray(x)
        schedule = self.ledger.schedule
        if self.form == "loop":
            skips = skip or schedule.skip_nonfinite
            self.ledger.schedule = dataclasses.replace(schedule, skip_nonfinite=skips)
        self.advance(jax.tree.unflatten(treedef, leaves), "compiled", skip=skip)
        self.ledger.schedule = schedule
        # Training would not go on from there.
        self.recent = []
        if self.form != "loop":
            self.params = moved(self.model(seed + 1, 1.0), self.place)

    def advance(self, target, how, sample=None, *, skip=False):
        """One update, to about ``target``."""
        target = moved(target, self.place)
        before = self.state
        where, tied = self.where_it_lies()
        if self.form == "loop":
            call = {
                "compiled": swa_jax.update_average,
                "donated": swa_jax.update_average,
                "eager": swa_jax.averaged_with,
            }[how]
            kept = None if how != "eager" else bits_of(before)
            self.state = call(
                before,
                target,
                self.setting.average(),
                sample=sample,
                skip_nonfinite=skip,
            )
            self.params = target
            if kept is not None:
                assert bits_of(before) == kept
            self.ledger.see(stored(target), sample=sample is None or bool(sample))
        else:
            self.params, self.state = self.stepped(target, how)
            self.ledger.see(stored(self.params))
        if tied:
            assert self.where_it_lies()[0] == where
        self.recent = [*self.recent, stored_tree(self.params)][-3:]

    def stepped(self, target, how):
        params, stats = self.params, None
        if self.form == "along":
            params, stats = params["params"], target["batch_stats"]
            target = target["params"]
        updates = towards(params, target)
        params, state = self.setting.step(how)(params, self.state, updates, stats)
        if self.form == "along":
            params = {"params": params, "batch_stats": stats}
        return params, state

    def where_it_lies(self):
        """Devices and parts of the average's leaves, and whether all are tied there."""
        leaves = jax.tree.leaves(trees(self.average))
        if not all(isinstance(x, jax.Array) for x in leaves):
            return [], False
        places = [
            (x.sharding.device_set, x.sharding.shard_shape(x.shape)) for x in leaves
        ]
        return places, all(x.committed for x in leaves)

    @rule(count=st.integers(0, 3))
    def told_of_updates_before(self, count):
        number = self.ledger.seen + count
        self.state = swa_jax.with_num_updates(self.state, number, self.setting.state)
        self.ledger.seen = number

    @rule(place=st.sampled_from(PLACES))
    def moved_to_other_devices(self, place):
        place = "eight" if self.setting.spread else place
        self.state = moved(self.state, place)
        self.params = moved(self.params, place)
        if self.form == "loop" and place == "free":
            # Weights alone: the average stays where it is.
            self.params = moved(self.params, "third")
        self.place = place if place != "free" else self.place

    @rule(name=st.sampled_from(FLOATS))
    def weights_of_another_dtype(self, name):
        dtypes = [x.dtype for x in stored(self.params)]
        real = [is_floating(d) and not is_complex(d) for d in dtypes]
        if self.form == "along" or not any(real):
            return
        leaves, treedef = jax.tree.flatten(self.params)
        cast = [
            jnp.asarray(stored(x)[0]).astype(name) if change else x
            for x, change in zip(leaves, real, strict=True)
        ]
        params = moved(jax.tree.unflatten(treedef, cast), self.place)
        now, then = [x.dtype for x in stored(params)], self.ledger.dtypes
        pairs = list(zip(now, then, strict=True))
        lawa = self.setting.state is swa_jax.LAWAState
        as_kept = self.ledger.row_as if lawa else self.ledger.kept_as
        if self.form == "loop" or all(
            not is_floating(a) or as_kept(a) == as_kept(b) for a, b in pairs
        ):
            self.params, self.recent = params, []
            return
        zeros = jax.tree.map(jnp.zeros_like, self.params)
        self.refuses(lambda: self.setting.tx().update(zeros, self.state, params))

    # What it must refuse, losing nothing.

    @rule(wrong=st.sampled_from(WRONG), at=st.integers(0, 10), jit=st.booleans())
    def something_wrong(self, wrong, at, jit):
        for call in self.wrong_calls(wrong, at, jit):
            self.refuses(call)

    def refuses(self, call):
        before, params = bits_of(self.state), bits_of(self.params)
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        assert str(error.value)
        assert bits_of(self.state) == before
        assert bits_of(self.params) == params

    def wrong_calls(self, wrong, at, jit):
        leaves, treedef = jax.tree.flatten(self.params)
        place = at % len(leaves) if leaves else 0

        def replaced(leaf):
            new = [*leaves[:place], leaf, *leaves[place + 1 :]]
            return jax.tree.unflatten(treedef, new)

        one = stored(leaves[place])[0] if leaves else None
        size, other_kind, text = None, None, "text"
        if one is not None:
            size = np.zeros((*np.shape(leaves[place]), 5), one.dtype)
            flips = np.int32 if is_floating(one.dtype) else np.float32
            other_kind = np.zeros(np.shape(leaves[place]), flips)
        no_values = None if one is None else jax.ShapeDtypeStruct(one.shape, one.dtype)
        models = {
            "shape": [] if one is None else [replaced(size)],
            "another structure": [(self.params, self.params), [self.params]],
            "less": [less] if (less := without_one(self.params)) is not None else [],
            "more": more_than(self.params),
            "another kind of number": [] if one is None else [replaced(other_kind)],
            "text": [] if one is None else [replaced(text)],
            "no values": [replaced(no_values)] if one is not None else [],
        }
        if wrong in models:
            for params in models[wrong]:
                if self.can_be_given(params):
                    yield lambda params=params: self.used(params, jit)
            return
        yield from self.other_wrong_calls(wrong, replaced, size)

    def can_be_given(self, params):
        """Statistics that are averaged along come in an argument of their own."""
        known = isinstance(params, dict) and params.keys() == self.params.keys()
        return self.form != "along" or known

    def used(self, params, jit):
        """An update with these parameters in place of the run's own."""
        if self.form == "loop":
            return swa_jax.update_average(self.state, params, self.setting.average())
        stats, updates = None, params
        if self.form == "along":
            params, stats = params["params"], params["batch_stats"]
            updates = params
        leaves = jax.tree.leaves(params)
        if jit and not any(isinstance(x, str | jax.ShapeDtypeStruct) for x in leaves):
            return self.setting.step("donated")(params, self.state, updates, stats)
        more = {"batch_stats": stats} if self.form == "along" else {}
        return self.setting.tx().update(updates, self.state, params, **more)

    def other_wrong_calls(self, wrong, replaced, size):
        setting, state, params = self.setting, self.state, self.params
        tx, in_chain = setting.tx, self.form == "chain"
        if wrong == "no params" and self.form != "loop":
            yield lambda: tx().update(params, state)
        if wrong == "another average":
            for name in ("swa", "ema", "lawa"):
                if METHODS[name].state is not setting.state:
                    yield self.averaged_by(Setting(name).average())
        if wrong == "another size" and any(map(is_floating, self.ledger.dtypes)):
            makes: dict[type, Callable[[int], Any]] = {
                swa_jax.LAWAState: swa_jax.lawa,
                swa_jax.SWAGState: swa_jax.swag,
            }
            if setting.state in makes and self.form != "along":
                yield self.averaged_by(makes[setting.state](7))
        if wrong == "another accumulator" and in_chain and self.accumulates_wider():
            other = Setting(setting.method, "bfloat16")
            yield lambda: other.tx().update(params, state, params)
        if wrong == "a sample that is none" and self.form == "loop":
            for sample in (1, "yes", np.ones(2, bool), jnp.ones(())):
                yield self.averaged_by(setting.average(), sample=sample)
        # Keys have no updates of any shape.
        has_updates = size is not None and KEY not in kinds(self.layout)
        if wrong == "updates of another shape" and in_chain and has_updates:
            yield lambda: tx().update(replaced(size), state, params)
        if wrong == "updates of another structure" and in_chain:
            yield lambda: tx().update((params, params), state, params)
        if wrong == "a count from before" and self.ledger.averaged:
            for count in (self.ledger.seen - 1, -1, 2**40, 1.5):
                yield lambda count=count: swa_jax.with_num_updates(state, count)
        if wrong == "a reader of another model" and size is not None:
            for tree in ((params, params), replaced(size)):
                yield lambda tree=tree: swa_jax.averaged_params(state, tree)

    def averaged_by(self, average, **options):
        """A call for the average's own state."""
        return lambda: swa_jax.update_average(
            self.average, self.params, average, **options
        )

    def accumulates_wider(self):
        """Whether in bfloat16 something would be kept otherwise than it is."""
        now = self.ledger
        then = dataclasses.replace(now, accumulator=jnp.bfloat16)
        name = "row_as" if self.setting.state is swa_jax.LAWAState else "kept_as"
        floats = [x.dtype for x in stored(self.params) if is_floating(x.dtype)]
        return any(getattr(then, name)(d) != getattr(now, name)(d) for d in floats)

    # Saved, killed, restored.

    @rule(data=st.data())
    def save(self, data):
        store = data.draw(st.sampled_from(stores(self.layout)), label="store")
        if self.form == "loop":
            what = {"state": self.state}
        else:
            what = {"state": self.state, "params": self.params}
        path = self.path / f"{len(self.saved)}"
        before = bits_of(what)
        write(store, path, what)
        assert bits_of(what) == before
        self.saved.append((store, path, self.setting, self.ledger.copy(), self.params))

    @precondition(lambda self: not self.saved)
    @rule(seed=SEEDS)
    def killed_before_anything_was_saved(self, seed):
        self.restart(seed)

    @precondition(lambda self: self.saved)
    @rule(
        data=st.data(),
        seed=SEEDS,
        place=st.sampled_from(PLACES),
        change=st.sampled_from(["nothing", "nothing", "schedule", "average"]),
    )
    def killed_and_restored(self, data, seed, place, change):
        number = data.draw(st.integers(0, len(self.saved) - 1), label="number")
        store, path, old, ledger, params = self.saved[number]
        self.setting, self.ledger = old, ledger.copy()
        if change == "schedule" and old.options in SCHEDULES:
            options = data.draw(st.sampled_from(SCHEDULES), label="options")
            self.setting = dataclasses.replace(old, options=options)
        if change == "average":
            names = st.sampled_from(restored_as(old, store))
            method = data.draw(names, label="method")
            self.setting = dataclasses.replace(old, method=method)
        self.ledger.definition = self.setting.definition
        self.ledger.schedule = self.setting.schedule
        self.place, self.recent = "eight" if self.setting.spread else place, []
        self.restore(store, path, params, make(self.layout, seed))
        assert type(self.average) is self.setting.state
        self.average_is_right()

    def restore(self, store, path, params, other):
        """Into the structure of a run that began with other weights."""
        target = {"state": self.fresh(other)}
        if self.form == "along":
            other = {"params": other, "batch_stats": STATISTICS}
        if self.form != "loop":
            target["params"] = jax.tree.map(with_dtype_of, other, params)
        if store == "orbax":
            found = read(store, path, abstract(target, self.place))
        else:
            found = moved(read(store, path, target), self.place)
        self.state = found["state"]
        self.params = found.get("params", params)
        if self.form == "loop":
            self.params = moved(self.params, self.place)

    @precondition(lambda self: self.saved)
    @rule(part=st.floats(0, 1, exclude_max=True))
    def killed_while_saving(self, part):
        """Half a file is refused, and what was saved before is still there."""
        store, path, *_ = self.saved[-1]
        if store == "orbax":
            return  # tests of whole processes have it, see docs/faults.md
        data = path.read_bytes()
        half = self.path / "half"
        half.write_bytes(data[: int(part * len(data))])
        target = {"state": self.state}
        if self.form != "loop":
            target["params"] = self.params
        before = bits_of(self.state)
        with pytest.raises(Exception):  # noqa: B017 - the format's own
            read(store, half, target)
        assert bits_of(self.state) == before
        assert path.read_bytes() == data

    # What is read.

    @rule(
        jit=st.booleans(),
        allow_empty=st.booleans(),
        which=st.sampled_from(["type", "none", "swa_params"]),
    )
    def read_weights(self, jit, allow_empty, which):
        before = bits_of(self.state)
        found = self.read_by(which, jit, allow_empty)
        assert structure(found) == structure(self.params)
        leaves = jax.tree.leaves(self.params)
        if not self.ledger.averaged:
            for got, param in zip(stored(found), stored(self.params), strict=True):
                assert got.dtype == param.dtype
                assert got.tobytes() == param.tobytes()
        else:
            for got, param, expected in zip(
                stored(found), stored(self.params), self.ledger.means(), strict=True
            ):
                assert got.dtype == param.dtype
                expected.check(got, "read")
        # Nobody else's memory.
        own = {id(x) for x in leaves}
        for x in jax.tree.leaves(found):
            if isinstance(x, jax.Array) and id(x) not in own:
                x.delete()
        assert bits_of(self.state) == before
        bits_of(self.params)

    def read_by(self, which, jit, allow_empty):
        if self.ledger.averaged == 0 and not allow_empty and not jit:
            expecting: Any = pytest.warns(
                UserWarning, match="nothing has been averaged"
            )
        else:
            expecting = contextlib.nullcontext()
        plain = self.setting.state is swa_jax.SWAState
        kind = self.setting.state if which == "type" else None

        def reader(state, params):
            if which == "swa_params" and plain:
                return swa_jax.swa_params(state, params, allow_empty=allow_empty)
            return swa_jax.averaged_params(state, params, kind, allow_empty=allow_empty)

        with expecting:
            return (jax.jit(reader) if jit else reader)(self.state, self.params)

    @rule()
    def read_diagnostics(self):
        state, window = self.state, self.ledger.definition.window
        count = self.ledger.averaged
        kept = count if window is None or not self.ledger.dtypes else min(count, window)
        assert int(swa_jax.models_in_average(state)) == kept
        if self.place != "free" or not self.ledger.dtypes:
            return
        apart = swa_jax.average_distance(state, self.params)
        found = swa_jax.averaged_params(state, self.params, allow_empty=True)
        with np.errstate(invalid="ignore", over="ignore"):
            total = sum(
                np.sum(np.abs(exact(a) - exact(b)) ** 2)
                for a, b in zip(stored(found), stored(self.params), strict=True)
                if is_floating(a.dtype)
            )
        # Of float32 sums of some tens of squares.
        np.testing.assert_allclose(float(apart), np.sqrt(total), rtol=1e-5, atol=1e-30)

    @precondition(lambda self: self.setting.state is swa_jax.SWAGState)
    @rule(seed=SEEDS, scale=st.sampled_from([0.0, 1.0, 2.0]))
    def draw_weights(self, seed, scale):
        if not self.ledger.averaged:
            return
        before = bits_of(self.state)
        found = swa_jax.swag_sample(
            jax.random.key(seed), self.state, self.params, scale=scale
        )
        ledger = self.ledger
        rank = ledger.definition.rank
        assert rank is not None
        columns = min(ledger.averaged, rank)
        everything = zip(
            stored(found),
            ledger.means(),
            ledger.squares(),
            ledger.rows(),
            strict=True,
        )
        for got, mean, squares, rows in everything:
            if squares is None:
                mean.check(got, "drawn")
                continue
            assert squares.off is not None
            total = np.abs(squares.value) + 2 * squares.off
            variance = total / ledger.averaged
            if columns >= 2:
                assert rows is not None
                low_rank = np.zeros(())
                for x in rows.values():
                    size = np.abs(x.value) + x.off
                    low_rank = low_rank + np.where(x.lost, 0, size**2)
                variance = (variance + low_rank / (columns - 1)) / 2
            # Of normal numbers one in 10^15 is eight deviations away.
            mean.off = mean.off + 8 * 2 * np.sqrt(scale * variance)
            mean.check(got, "drawn")
        assert bits_of(self.state) == before

    @precondition(lambda self: self.recent)
    @rule(weighted=st.booleans())
    def soup_of_the_latest(self, weighted):
        models = self.recent
        shares = np.arange(1.0, len(models) + 1) if weighted else np.ones(len(models))
        found = swa_jax.soup(models, list(shares) if weighted else None)
        shares = shares / shares.sum()
        for got, *leaf in zip(stored(found), *map(stored, models), strict=True):
            if not is_floating(got.dtype):
                assert got.tobytes() == leaf[-1].tobytes()
                continue
            value = sum(w * exact(x) for w, x in zip(shares, leaf, strict=True))
            largest = np.max([np.abs(exact(x)) for x in leaf], axis=0)
            off = 20 * len(models) * 2.0**-24 * largest
            off = off + rounded(largest + off, got.dtype)
            assert (np.abs(exact(got) - value) <= off).all()

    @precondition(lambda self: self.recent and isinstance(self.recent[0], dict))
    @rule()
    def soup_of_the_latest_on_disk(self):
        """With the bits of the one in memory."""
        if not any(x.size for x in jax.tree.leaves(self.recent)):
            return
        folder = self.path / f"soup {len(list(self.path.iterdir()))}"
        folder.mkdir()
        paths = [folder / f"{i}.msgpack" for i in range(len(self.recent))]
        for path, model in zip(paths, self.recent, strict=True):
            write("msgpack", path, model)
        output = folder / "soup.msgpack"
        swa_jax.average_checkpoints(paths, output)
        found = read("msgpack", output, self.recent[0])
        assert bits(found) == bits(swa_jax.soup(self.recent))

    @precondition(lambda self: self.setting.method == "power ema by width")
    @rule()
    def stored_width_comes_back(self):
        if self.ledger.averaged:
            average = jax.device_get(self.average.avg_params)
            stored_as = swa_jax.Snapshot(self.ledger.averaged, 0.1, average)
            found = swa_jax.posthoc_ema(
                [stored_as], sigma_rel=0.1, step=self.ledger.averaged
            )
            for got, mean in zip(stored(found), self.ledger.means(), strict=True):
                mean.check(got, "of a stored width")

    # Always.

    @invariant()
    def counters_are_right(self):
        if not hasattr(self, "state"):
            return
        state = self.average
        counts = int(state.num_updates), int(state.num_averaged)
        assert counts == (self.ledger.seen, self.ledger.averaged)

    def average_is_right(self):
        """Everything that the state holds."""
        ledger, state = self.ledger, self.average
        if not ledger.averaged:
            return
        if self.setting.state is swa_jax.LAWAState:
            self.stack_is_right(state.window, ledger)
            for got, mean in zip(stored(state.avg_params), ledger.means(), strict=True):
                mean.check(got, "mean of a window")
            return
        for got, mean in zip(stored(state.avg_params), ledger.means(), strict=True):
            mean.check(got, "mean")
        if self.setting.state is swa_jax.SWAGState:
            kept = [s for s in ledger.squares() if s is not None]
            for got, squares in zip(stored(state.sq_deviations), kept, strict=True):
                squares.check(got, "squares")
            self.stack_is_right(state.deviations, ledger)

    def stack_is_right(self, stack, ledger):
        if ledger.definition.window is None and not ledger.definition.rank:
            return
        kept = [rows for rows in ledger.rows() if rows is not None]
        for got, rows in zip(stored(stack), kept, strict=True):
            for row, expected in rows.items():
                expected.check(got[row], f"row {row}")

    def teardown(self):
        try:
            if hasattr(self, "state"):
                self.average_is_right()
        finally:
            self.folder.close()
            if next(RUNS) % 1000 == 0:  # or ten thousand runs' programs fill the memory
                jax.clear_caches()


def restored_as(setting, store):
    """The averages whose state a checkpoint of this one can be restored into."""
    state = setting.state
    states = ALIKE if state in ALIKE and store != "pickle" else (state,)
    stacks = setting.definition.window, setting.definition.rank
    return [
        name
        for name, method in METHODS.items()
        if method.state in states
        and (method.definition.window, method.definition.rank) == stacks
    ]


def with_dtype_of(new, old):
    """Other weights of the dtypes that these have come to."""
    if not isinstance(old, jax.Array) or is_key(old):
        return new
    return jnp.asarray(new).astype(old.dtype)


def stored_tree(tree):
    return jax.tree.unflatten(jax.tree.structure(tree), stored(tree))


def bits_of(tree):
    return bits(stored(tree))


def without_one(tree):
    """A container less one of what it holds, or nothing."""
    if isinstance(tree, dict) and tree:
        return dict(list(tree.items())[:-1])
    if type(tree) in (list, tuple) and tree:
        return tree[:-1]
    return None


def more_than(tree):
    """A weight more, also where there was none."""
    found = []
    if isinstance(tree, dict):
        found.append({**tree, "more": jnp.ones(2)})
    leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda x: x is None)
    if any(x is None for x in leaves):
        filled = [jnp.ones(2) if x is None else x for x in leaves]
        found.append(jax.tree.unflatten(treedef, filled))
    return found


DEFAULT_EXAMPLES = 100  # Hypothesis' own
COMMON = settings(
    deadline=None, stateful_step_count=15, suppress_health_check=list(HealthCheck)
)


def test_a_few_runs():
    run_state_machine_as_test(Run, settings=settings(COMMON, max_examples=5))


class RunOfAnyTree(Run):
    """One time in five of a tree of its own, which then has to be compiled."""

    layouts = st.one_of(*[st.sampled_from(LAYOUTS)] * 4, any_layout())


@pytest.mark.slow
def test_many_runs():
    number = settings().max_examples  # of a profile, where one was chosen
    number = number if number > DEFAULT_EXAMPLES else 300
    chosen = settings(COMMON, max_examples=number)
    run_state_machine_as_test(RunOfAnyTree, settings=chosen)
