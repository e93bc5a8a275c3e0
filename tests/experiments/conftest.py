"""A data directory of the tests' own, and a configuration that trains in moments."""

import dataclasses
import pathlib

import numpy as np
import pytest

from experiments.config.named import DIGITS
from experiments.config.schema import Config, FineTuneTuning, Tuning, override
from experiments.data.dataset import Examples
from experiments.data.splits import MemorySplit
from experiments.training.protocols import FineTune


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("tensorflow_datasets")


@pytest.fixture(scope="session")
def tiny_model(data_dir: pathlib.Path) -> Config:
    """Four epochs of 3 steps: 20 examples in batches of 8. Writes nothing."""
    return override(
        DIGITS,
        workdir=pathlib.Path("/dev/null"),
        data_dir=data_dir,
        seeds=2,
        train_examples=20,
        epochs=4,
        swa_epochs=(1, 3),
        batch_size=8,
        eval_batch_size=16,
        learning_rate=0.1,
        swa_lr=0.05,
        weight_decay=5e-4,
        widths=(4, 4),
        strides=(2, 2),
        averages=(),
        width_plot=False,
    )


@pytest.fixture
def tiny(tiny_model: Config, tmp_path: pathlib.Path) -> Config:
    """The same, with a directory to write to."""
    return override(tiny_model, workdir=tmp_path / "run")


@pytest.fixture
def tiny_tuning() -> Tuning:
    """One value for each rate."""
    return Tuning(
        tune_learning_rates=(0.1,), tune_weight_decays=(5e-4,), tune_swa_lrs=(0.1,)
    )


def fine_tuned(config: Config) -> Config:
    """The same with arms that start from a converged baseline: 4 epochs and 1, 3."""
    protocol = FineTune(epochs=4, swa_epochs=(1, 3), swa_lr=0.05, control_lr=0.01)
    return dataclasses.replace(config, protocol=protocol)


@pytest.fixture(scope="session")
def tiny_fine_tune_model(tiny_model: Config) -> Config:
    return fine_tuned(tiny_model)


@pytest.fixture
def tiny_fine_tune(tiny: Config) -> Config:
    return fine_tuned(tiny)


@pytest.fixture
def fine_tune_tuning(tiny_tuning: Tuning) -> FineTuneTuning:
    return FineTuneTuning(**vars(tiny_tuning) | {"tune_control_lrs": (0.01,)})


@pytest.fixture(scope="session")
def split() -> MemorySplit:
    """Twenty random images, whose labels a network can learn by heart."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 17, (20, 8, 8, 1), dtype=np.uint8)
    labels = rng.integers(0, 10, 20, dtype=np.int32)
    return MemorySplit(Examples(images, labels))
