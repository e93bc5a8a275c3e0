import dataclasses
import pathlib

import pytest

from experiments import configs


def test_every_experiment_is_described():
    assert set(configs.EXPERIMENTS) == {"digits", "fashion_mnist"}
    for name, (description, config) in configs.EXPERIMENTS.items():
        assert config.name == name
        assert config.workdir == pathlib.Path("runs") / name
        assert 20 < len(description) < 80
        assert "\n" not in description


def test_no_setting_has_a_default_of_its_own():
    for field in dataclasses.fields(configs.Config):
        assert field.default is dataclasses.MISSING, field.name
        assert field.default_factory is dataclasses.MISSING, field.name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"seeds": 0}, "seeds is 0; it must be at least 1"),
        ({"batch_size": -1}, "batch_size is -1; it must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"),
        ({"swa_lr": float("nan")}, "swa_lr is nan; it must be above 0"),
        ({"train_examples": 1}, "train_examples is 1; BatchNorm needs at least 2"),
        ({"max_shift": -1}, "max_shift is -1; it must not be negative"),
        ({"epochs": 10}, r"contains 10 with epochs=10.*Raise --epochs"),
        ({"swa_epochs": (0,)}, "swa_epochs contains 0 .* must be at least 1"),
        ({"swa_epochs": ()}, "swa_epochs is empty; .* --swa-epochs 5 10"),
        ({"swa_epochs": (5, 5)}, r"swa_epochs is \(5, 5\); each window .* once"),
        ({"strides": (1,)}, r"strides is \(1,\); give one of each"),
    ],
)
def test_settings_that_cannot_run_are_errors(overrides, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(configs.DIGITS, **overrides)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((False, "host:1", 2, None), "are host:1, 2, None; give all three, or none"),
        ((False, None, 2, 0), "are None, 2, 0; give all three, or none"),
        ((False, "host:1", 2, 2), "process_id is 2 with num_processes=2; .* from 0"),
        ((False, "host:1", 2, -1), "process_id is -1 with num_processes=2"),
        ((True, "host:1", 2, 0), "distributed is set along with coordinator_address"),
    ],
)
def test_clusters_that_cannot_be_joined_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(configs.DIGITS, cluster=configs.Cluster(*settings))
