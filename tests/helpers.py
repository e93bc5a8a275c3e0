"""What several tests share."""

import io
import json
from collections.abc import Sequence
from typing import Any

import jax
import rich.console

from experiments.data.augment import WHOLE
from experiments.data.batches import TrainBatches
from experiments.data.dataset import DataSet
from experiments.data.splits import MemorySplit, load_splits
from experiments.jobs.main import Trainer, train_and_evaluate


def quiet(width=120):
    """A console that keeps what it is told."""
    return rich.console.Console(file=io.StringIO(), width=width)


def trainer(config, split):
    """Arms and scorers of a configuration, on one split for everything."""
    return Trainer(config, dict.fromkeys(("train", "validation", "test"), split))


def memory_splits(
    dataset: DataSet, names: Sequence[str], **options: Any
) -> dict[str, MemorySplit]:
    """`load_splits` of a data set that is read into memory, as all small ones are."""
    found = {}
    for name, split in load_splits(dataset, names, **options).items():
        assert isinstance(split, MemorySplit)
        found[name] = split
    return found


def told(console: rich.console.Console) -> str:
    """What a quiet console was told."""
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def compile_arm(config, split, window):
    """Compile the arm that averages the last `window` epochs; 0: the plain one."""
    name = f"swa{window}" if window else "sgd"
    return trainer(config, split).compile(config.plan[name])


def train_batches(split, config, seed, share=WHOLE, *, first_step=0, last_step):
    """The batches that a configuration trains on."""
    batches = TrainBatches(split, config.data, share)
    return batches.read(seed, first_step, last_step)


def run_job(config):
    """Run a whole job; return the rows of its results."""
    train_and_evaluate(config, quiet())
    return rows_of(config.workdir)


def rows_of(workdir):
    """The rows of a job's results."""
    return json.loads((workdir / "results.json").read_text())["rows"]


def largest_difference(a, b):
    """The largest difference of two trees of arrays."""
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: abs(x - y).max(), a, b)))
