import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments.runtime import store as checkpoints
from experiments.runtime.errors import StorageError
from experiments.runtime.store import Store
from tests.swa_jax.transformations import structure


def state(number, size=10):
    rng = np.random.default_rng(number)
    return {
        "params": {"kernel": rng.normal(size=(size, 3)).astype(np.float32)},
        "opt_state": (np.int32(number), rng.integers(0, 2**32, 2, dtype=np.uint32)),
    }


def assert_same(found, expected):
    assert structure(found) == structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "run" / "checkpoints", keep=2) as store:
        yield store


def test_newest_checkpoints_are_kept_exactly(store):
    assert store.latest() is None
    for step in (5, 10, 15):
        store.save(step, state(step), {"metrics": [[0.1, 1 / 3]], "step": step})
    store.wait()
    assert store.latest() == 15
    assert sorted(int(p.name) for p in store.directory.iterdir()) == [10, 15]
    step, found, extra = store.restore(state(0))
    assert step == 15
    assert_same(found, state(15))
    assert extra == {"metrics": [[0.1, 1 / 3]], "step": 15}  # floats to the last bit


def test_a_step_is_saved_once(store):
    store.save(5, state(5), {})
    store.save(5, state(6), {})  # a resumed run comes by again
    assert_same(store.restore(state(0))[1], state(5))


def test_what_is_saved_is_the_moment_of_saving(store):
    """Orbax writes in the background, while the training loop appends."""
    for step in range(1, 6):
        metrics = [[0.1, 0.2]] * 3
        store.save(step, state(step, size=1000), {"metrics": metrics})
        metrics.append([9.0, 9.0])
        store.wait()
        assert store.restore(state(0, size=1000))[2] == {"metrics": [[0.1, 0.2]] * 3}


def test_only_json_can_be_saved_beside_the_arrays(store):
    with pytest.raises(TypeError, match="not JSON serializable"):
        store.save(5, state(5), {"loss": np.float32(1)})
    assert store.latest() is None


def test_without_a_checkpoint_there_is_nothing_to_restore(store):
    with pytest.raises(StorageError, match="holds no complete checkpoint"):
        store.restore(state(0))


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (
            state(0, size=11),
            r"kernel is float32\[10, 3\] instead of .*\[11, 3\]",
        ),
        ({"params": state(0)["params"]}, r"differs in opt_state/0, opt_state/1\."),
        (state(0)["params"], "another network or optimizer"),
    ],
)
def test_foreign_checkpoint_is_an_error(store, like, message):
    store.save(5, state(5), {})
    with pytest.raises(StorageError, match=message):
        store.restore(like)
    assert_same(store.restore(state(0))[1], state(5))  # it is still there


def data_files(place):
    return [p for p in place.rglob("*") if p.is_file() and p.parent.name == "d"]


# Orbax drops its event loop when reading fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_truncated_checkpoint_is_an_error_and_the_one_before_remains(store):
    for step in (5, 10):
        store.save(step, state(step), {})
    store.wait()
    for path in data_files(store.directory / "10"):
        os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(StorageError, match=r"10 is damaged.*Delete .*10 to go on from"):
        store.restore(state(0))
    with Store(store.directory, keep=2) as again, pytest.raises(StorageError):
        again.restore(state(0))
    # What the message says helps.
    subprocess.run(["rm", "-r", str(store.directory / "10")], check=True)
    with Store(store.directory, keep=2) as again:
        step, found, _ = again.restore(state(0))
    assert step == 5
    assert_same(found, state(5))


def test_changed_bits_are_noticed(store, monkeypatch):
    """Also where the files' own format would not: the sum is over the arrays."""
    honest = checkpoints._crc32
    monkeypatch.setattr(checkpoints, "_crc32", lambda array: honest(array) ^ 1)
    store.save(5, state(5), {})
    monkeypatch.setattr(checkpoints, "_crc32", honest)
    with pytest.raises(StorageError, match=r"damaged: .* check sum.*from the start"):
        store.restore(state(0))


def test_half_a_checkpoint_does_not_count(store):
    store.save(5, state(5), {})
    store.close()
    leftover = store.directory / "10.orbax-checkpoint-tmp"
    leftover.mkdir()
    (leftover / "part").write_bytes(b"half")
    with Store(store.directory, keep=2) as again:
        assert again.latest() == 5
        assert not leftover.exists()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if subprocess.run(options, capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs can be mounted: not root, or not allowed here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


# In a process of its own: tensorstore's threads may still complain of a write that
# failed when the test is over.
FILL = """
import sys, pathlib
from experiments.runtime import store as checkpoints
from experiments.runtime.errors import StorageError
from tests.experiments.test_store import state
checkpoints._METADATA_BYTES = int(sys.argv[2])
store = checkpoints.Store(pathlib.Path(sys.argv[1]), keep=9)
for step in range(5, 50, 5):
    # Random floats hardly compress: a checkpoint takes half a megabyte.
    store.save(step, state(step, size=50_000), {})
    store.wait()
    print(step, flush=True)
"""


@pytest.mark.processes
@pytest.mark.parametrize(
    "metadata_bytes",
    # As under a quota, which the free bytes do not show.
    [checkpoints._METADATA_BYTES, -(2**40)],
    ids=["before writing", "half-way"],
)
def test_full_disk_is_an_error_and_keeps_what_is_there(small_disk, metadata_bytes):
    done = subprocess.run(
        [sys.executable, "-c", FILL, str(small_disk / "c"), str(metadata_bytes)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert re.search(
        r"StorageError: .*the disk is full \([\d,]+ bytes free", done.stderr
    ), done.stderr
    saved = [int(line) for line in done.stdout.split()]
    assert saved
    with Store(small_disk / "c", keep=9) as store:
        step, found, _ = store.restore(state(0, size=50_000))
    assert step == saved[-1]
    assert_same(found, state(step, size=50_000))


COUNTER = """
import sys, numpy as np, pathlib
from experiments.runtime.store import Store
with Store(pathlib.Path(sys.argv[1]), keep=2) as store:
    step = 0
    if store.latest() is not None:
        step, state, extra = store.restore({"x": np.zeros(200_000)})
        assert np.all(state["x"] == step) and extra == {"step": step}, step
    print("ready", flush=True)
    while True:
        step += 1
        store.save(step, {"x": np.full(200_000, float(step))}, {"step": step})
"""


@pytest.mark.processes
@pytest.mark.slow
def test_killed_at_any_moment_the_newest_checkpoint_is_whole(tmp_path):
    rng, last = np.random.default_rng(0), 0
    for _ in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", COUNTER, str(tmp_path / "c")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline() == b"ready\n", process.stderr.read()
            time.sleep(rng.uniform(0.05, 0.6))
            process.send_signal(signal.SIGKILL)
        with Store(tmp_path / "c", keep=2) as store:
            newest = store.latest()
            if newest is None:  # killed during the very first save
                continue
            step, found, extra = store.restore({"x": np.zeros(200_000)})
        assert step == newest >= last
        assert extra == {"step": step}
        assert np.all(found["x"] == step)
        last = step
    assert last > 0
