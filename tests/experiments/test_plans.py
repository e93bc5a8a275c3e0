import dataclasses
import math

import numpy as np
import pytest

from experiments.config.named import EXPERIMENTS
from experiments.config.schema import override
from experiments.training.any_budget import AnyBudget


def cosine(peak, share):
    return peak * (1 + math.cos(math.pi * min(share, 1))) / 2


def by_name(config):
    return {arm.name: arm for arm in config.plan}


def test_side_by_side(tiny):
    config = override(tiny, learning_rate=0.4, swa_lr=0.1)
    arms = by_name(config)
    assert list(arms) == ["sgd", "swa1", "swa3"]
    assert {arm.epochs for arm in arms.values()} == {4}
    assert [arm.averages_from for arm in arms.values()] == [None, 4, 2]
    # 5 steps an epoch; SGD's cosine ends at 0 after 20, SWA's at 0.1 after 5.
    sgd, swa = (arms[name].learning_rates(5) for name in ("sgd", "swa3"))
    expected = [cosine(0.4, step / 20) for step in range(20)]
    np.testing.assert_allclose(sgd, expected, rtol=1e-5, atol=1e-7)
    expected = [0.1 + cosine(0.3, step / 5) for step in range(20)]
    np.testing.assert_allclose(swa, expected, rtol=1e-5)
    # Other statistics than the BatchNorm pass's are shown for the longest window.
    weights = {name: [r.weights for r in arm.readouts] for name, arm in arms.items()}
    assert weights == {
        "sgd": ["iterate"],
        "swa1": ["average"],
        "swa3": [
            "average",
            "average, statistics averaged along",
            "average, no BatchNorm pass",
        ],
    }


def test_fine_tune(tiny_fine_tune):
    arms = by_name(tiny_fine_tune)
    assert list(arms) == ["converged", "swa", "control", "sgd5", "sgd7"]
    assert {name: arm.epochs for name, arm in arms.items()} == {
        "converged": 4,
        "swa": 7,
        "control": 7,
        "sgd5": 5,
        "sgd7": 7,
    }
    for name in ("swa", "control"):
        assert (arms[name].parent, arms[name].first_epoch) == ("converged", 4)
    assert arms["swa"].averages_from == 5
    # Three further epochs of two steps each, at the arm's own constant rate.
    for name, rate in (("swa", 0.05), ("control", 0.01)):
        rates = arms[name].learning_rates(2)
        np.testing.assert_array_equal(rates, np.full(6, rate, np.float32))
    np.testing.assert_allclose(
        arms["sgd7"].learning_rates(2),
        [cosine(0.1, step / 14) for step in range(14)],
        rtol=1e-5,
        atol=1e-8,
    )
    assert [(r.epoch, r.weights) for r in arms["swa"].readouts] == [
        (5, "average"),
        (7, "average"),
        (7, "average, statistics averaged along"),
        (7, "average, no BatchNorm pass"),
        (7, "iterate"),
    ]
    assert [r.epoch for r in arms["control"].readouts] == [5, 7]


def test_budgets_are_the_original_repositorys():
    """Constant to half, linear to 0.9, then 0.01 of the first rate, or `swa_lr`."""
    config = EXPERIMENTS["cifar10_vgg16"].config
    arms = by_name(config)
    assert list(arms) == ["sgd1", "sgd1.25", "sgd1.5", "swa"]

    def original(epoch, lr, total, ratio):
        t = epoch / total
        if t <= 0.5:
            return lr
        if t <= 0.9:
            return lr * (1 - (1 - ratio) * (t - 0.5) / 0.4)
        return lr * ratio

    for name, total, ratio in (("sgd1.25", 250, 0.01), ("swa", 161, 0.2)):
        rates = arms[name].learning_rates(1)
        expected = [original(e, 0.05, total, ratio) for e in range(len(rates))]
        np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-8)
    assert [r.epoch for r in arms["swa"].readouts] == [200, 250, 300]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_a_plan(name):
    arms = EXPERIMENTS[name].config.plan
    seen = set()
    for arm in arms:
        assert arm.parent is None or arm.parent in seen  # parents come first
        seen.add(arm.name)
        assert max(r.epoch for r in arm.readouts) == arm.epochs
        assert len({r.label for r in arm.readouts}) == len(arm.readouts)
    assert any(arm.averages_from for arm in arms)


def test_other_averages_and_early_stopping_add_readouts_only(tiny):
    averages = "ema:0.9", "power:0.1", "lawa:2", "swag:3"
    plan = override(tiny, averages=averages, early_stopping=True).plan
    sgd, short, swa = plan
    assert [(r.label, r.stopped_early) for r in sgd.readouts] == [
        ("SGD", False),
        ("SGD, stopped early", True),
    ]
    assert (short.others, len(short.readouts)) == ((), 1)
    assert tuple(each.name for each in swa.others) == averages
    assert [(r.label, r.method, r.weights) for r in swa.readouts[-5:]] == [
        ("last iterate (0.05)", "sgd", "iterate"),
        ("EMA 0.9", "ema", "ema:0.9"),
        ("power EMA 0.1", "power", "power:0.1"),
        ("LAWA, 2 epochs", "lawa", "lawa:2"),
        ("SWAG, 3 samples", "swag", "swag:3"),
    ]
    assert swa.tuned_by == ("average",)


ANY_BUDGET = AnyBudget(
    epochs=10, read_at=(5, 10), swa_lr=0.2, averages=("ema:0.9",), peaks=(0.4, 0.8)
)


def test_any_budget(tiny):
    arms = by_name(dataclasses.replace(tiny, protocol=ANY_BUDGET))
    assert {name: arm.epochs for name, arm in arms.items()} == {
        "cooldown5": 5,
        "cooldown10": 10,
        "sgd5": 5,
        "sgd10": 10,
        "constant": 10,
    }
    # Two steps an epoch: the last fifth of 10 epochs is 4 steps.
    rates = {name: arm.learning_rates(2) for name, arm in arms.items()}
    np.testing.assert_allclose(rates["constant"], [0.2] * 20)
    down = [*[0.2] * 16, 0.2, 0.15, 0.1, 0.05]
    np.testing.assert_allclose(rates["cooldown10"], down, rtol=1e-6)
    for name, peak, steps in (("sgd5", 0.4, 10), ("sgd10", 0.8, 20)):
        expected = [cosine(peak, step / steps) for step in range(steps)]
        np.testing.assert_allclose(rates[name], expected, rtol=1e-5, atol=1e-7)
    constant = arms["constant"]
    assert [(r.label, r.epoch, r.weights) for r in constant.readouts[-3:]] == [
        ("last iterate (0.2), 10 epochs", 10, "iterate"),
        ("mean of every epoch, 10 epochs", 10, "average"),
        ("EMA 0.9, 10 epochs", 10, "ema:0.9"),
    ]
    assert len(constant.readouts) == 6
    assert constant.tuned_by == ("ema:0.9",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"read_at": (5, 8)}, r"read_at is \(5, 8\) with epochs=10"),
        ({"read_at": (10, 5)}, "in ascending order"),
        ({"read_at": ()}, "read_at is"),
        ({"read_at": (0, 10)}, "read_at is"),
        ({"peaks": (0.4,)}, r"peaks is \(0.4,\); give a rate above 0 for each"),
        ({"peaks": (0.4, 0.0)}, "peaks is"),
        ({"cooldown": 1.0}, "cooldown is 1.0"),
        ({"averages": ("ema",)}, "averages contains 'ema'"),
    ],
)
def test_budgets_that_cannot_be_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ANY_BUDGET, **changes)
