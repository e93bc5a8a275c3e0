import dataclasses
import io
import json
import math

import pytest
import rich.console

from experiments import configs, data, tune
from experiments.train import train


def quiet():
    return rich.console.Console(file=io.StringIO(), width=120)


@pytest.mark.parametrize(
    ("peak", "evaluated"),
    [
        (2.0, [1.0, 2.0, 4.0]),  # inside: the grid suffices
        (8.0, [1.0, 2.0, 4.0, 8.0, 16.0]),  # one beyond the peak shows that it is one
        (0.5, [0.25, 0.5, 1.0, 2.0, 4.0]),
        (1e9, [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]),  # gives up after four
    ],
)
def test_grid_grows_until_its_best_is_inside(peak, evaluated):
    calls = []

    def merit(value):
        calls.append(value)
        return -abs(math.log(value / peak))

    best = tune.search_grid((4.0, 1.0, 2.0), merit, factor=2)
    assert sorted(calls) == evaluated  # each of them once
    assert best == min(peak, max(evaluated))


@pytest.fixture
def splits_read(monkeypatch):
    """The names of all splits that were loaded."""
    names, load_splits = [], data.load_splits

    def recording(config, wanted):
        names.extend(wanted)
        return load_splits(config, wanted)

    monkeypatch.setattr(data, "load_splits", recording)
    return names


def test_tuning_never_reads_the_test_split(tiny, splits_read, monkeypatch):
    monkeypatch.setattr(tune, "MAX_EXTENSIONS", 0)
    chosen = tune.tune(tiny, quiet())
    assert splits_read == ["train", "validation"]
    assert chosen == {"learning_rate": 0.1, "weight_decay": 5e-4, "swa_lr": 0.1}
    written = json.loads((tiny.workdir / "tuning.json").read_text())
    assert written["chosen"] == chosen
    assert [trial["arm"] for trial in written["trials"]] == ["sgd", "swa1", "swa3"]
    for trial in written["trials"]:
        (accuracy,) = trial["accuracy"]
        # The validation split has 300 images.
        assert 300 * accuracy == pytest.approx(round(300 * accuracy))


def test_choice_is_the_best_of_the_validation_scores(tiny, monkeypatch):
    """With made-up scores, whose best settings are known."""
    config = dataclasses.replace(
        tiny,
        tune_learning_rates=(0.1, 0.2, 0.4),
        tune_weight_decays=(1e-4, 4e-4, 16e-4),
        tune_swa_lrs=(0.01, 0.02, 0.04),
    )

    def made_up(config, splits, name, parents):
        if name != "sgd":
            # The windows disagree: 0.04 and 0.01 alone, 0.02 on average.
            best = {"swa1": {0.02: 0.8, 0.04: 0.9}, "swa3": {0.01: 0.9, 0.02: 0.8}}
            accuracy = best[name].get(config.swa_lr, 0.1)
            assert (config.learning_rate, config.weight_decay) == (0.2, 4e-4)
        else:
            good = (config.learning_rate == 0.2) + (config.weight_decay == 4e-4)
            accuracy = 0.3 * good
        rates = config.learning_rate, config.weight_decay, config.swa_lr, None
        return [tune.Trial(name, name, *rates, (accuracy, accuracy), (1.0, 1.0))]

    monkeypatch.setattr(tune, "_run_trials", made_up)
    console = quiet()
    chosen = tune.tune(config, console)
    assert chosen == {"learning_rate": 0.2, "weight_decay": 4e-4, "swa_lr": 0.02}
    assert "60.00 ± 0.00" in console.file.getvalue()


def trial(accuracy, loss):
    return tune.Trial("SGD", "sgd", 0.1, 0.0, None, None, (accuracy,), (loss,))


def test_equal_accuracies_are_told_apart_by_loss(tiny):
    worse, better = (tune.merit(tiny, [trial(0.9, loss)]) for loss in (0.5, 0.4))
    assert better > worse


def test_text_is_judged_by_loss():
    _, config = configs.EXPERIMENTS["shakespeare"]
    worse, better = trial(0.9, 1.5), trial(0.8, 1.4)
    assert tune.merit(config, [better]) > tune.merit(config, [worse])


def test_fine_tuning_tunes_the_control_too(tiny_fine_tune, monkeypatch):
    monkeypatch.setattr(tune, "MAX_EXTENSIONS", 0)
    trained = []

    def recording(config, compiled, *args, **kwargs):
        trained.append(compiled.arm.name)
        return train(config, compiled, *args, **kwargs)

    monkeypatch.setattr(tune, "train", recording)
    chosen = tune.tune(tiny_fine_tune, quiet())
    assert chosen["control_lr"] == 0.01
    # The whole budget tunes the plain arm; the baseline is trained once for both.
    assert trained == ["sgd7", "converged", "swa", "control"]


def test_diverged_trial_is_never_the_best(tiny):
    splits = data.load_splits(tiny, ("train", "validation"))
    config = dataclasses.replace(tiny, learning_rate=1e30, swa_lr=1e30)
    (found,) = tune._run_trials(config, splits, "sgd", {})
    assert (found.accuracy, found.loss) == ((0.0,), (math.inf,))
