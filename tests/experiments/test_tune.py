import dataclasses
import json
import math
import pathlib

import pytest

import swa_jax
from experiments.config.named import EXPERIMENTS
from experiments.config.schema import FREE, Tuning, override, settings_of
from experiments.data.splits import load_splits
from experiments.jobs import tune
from experiments.jobs.main import Trainer
from experiments.runtime.errors import StorageError
from experiments.training.any_budget import AnyBudget
from experiments.training.loop import train
from tests.helpers import quiet, told


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

    said: list[float] = []
    best = tune.search_grid((4.0, 1.0, 2.0), merit, 2, said.append)
    assert sorted(calls) == evaluated  # each of them once
    assert best == min(peak, max(evaluated))
    assert said == ([best] if peak == 1e9 else [])


def test_grid_of_one_value_stays():
    said: list[float] = []
    assert tune.search_grid((4.0,), lambda value: value, 2, said.append) == 4.0
    assert said == []


def test_cells_that_two_searches_share_are_trained_once(tiny, monkeypatch):
    """The longest budget's peaks are those that the first search tried."""
    protocol = AnyBudget(
        epochs=4, read_at=(2, 4), swa_lr=0.1, averages=("ema:0.9",), peaks=()
    )
    tuning = Tuning(
        tune_learning_rates=(0.1, 0.2, 0.4),
        tune_weight_decays=(1e-4,),
        tune_swa_lrs=(0.1,),
    )
    ran = []

    def made_up(tuner, trainer, arm, parent):
        ran.append(tune._setting(trainer.config, arm))
        rate, _ = _rates(trainer.config)
        score = -abs(math.log(rate / 0.2))
        labels = tune._tuned_labels(arm)
        return [tune.Trial(n, *ran[-1], (score,), (1.0,)) for n in labels]

    monkeypatch.setattr(tune._Tuner, "_train", made_up)
    config = dataclasses.replace(tiny, protocol=protocol)
    chosen = tune.tune(config, tuning, quiet())
    assert chosen["peaks"] == (0.2, 0.2)
    assert len(ran) == len(set(ran)) == 3 + 1 + 3
    trials = read_tuning(config)["trials"]
    assert len(trials) == 3 + 2 + 3  # the average is read at two budgets


def _rates(config):
    return config.optimizer.learning_rate, config.optimizer.weight_decay


@pytest.fixture
def splits_read(monkeypatch):
    """The names of all splits that were loaded."""
    names = []

    def recording(dataset, wanted, *, hold_out):
        assert hold_out
        names.extend(wanted)
        return load_splits(dataset, wanted, hold_out=hold_out)

    monkeypatch.setattr(tune, "load_splits", recording)
    return names


@pytest.mark.slow
def test_tuning_never_reads_the_test_split(tiny, tiny_tuning, splits_read, monkeypatch):
    monkeypatch.setattr(tune, "MAX_EXTENSIONS", 0)
    chosen = tune.tune(tiny, tiny_tuning, quiet())
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
    tuning = Tuning(
        tune_learning_rates=(0.1, 0.2, 0.4),
        tune_weight_decays=(1e-4, 4e-4, 16e-4),
        tune_swa_lrs=(0.01, 0.02, 0.04),
    )

    def made_up(tuner, trainer, arm, parent):
        rate, decay = _rates(trainer.config)
        swa_lr, name = trainer.config.protocol.swa_lr, arm.name
        if name != "sgd":
            # The windows disagree: 0.04 and 0.01 alone, 0.02 on average.
            best = {"swa1": {0.02: 0.8, 0.04: 0.9}, "swa3": {0.01: 0.9, 0.02: 0.8}}
            accuracy = best[name].get(swa_lr, 0.1)
            assert (rate, decay) == (0.2, 4e-4)
        else:
            good = (rate == 0.2) + (decay == 4e-4)
            accuracy = 0.3 * good
        rates = rate, decay, swa_lr, None
        return [tune.Trial(name, name, *rates, (accuracy, accuracy), (1.0, 1.0))]

    monkeypatch.setattr(tune._Tuner, "_train", made_up)
    console = quiet()
    chosen = tune.tune(tiny, tuning, console)
    assert chosen == {"learning_rate": 0.2, "weight_decay": 4e-4, "swa_lr": 0.02}
    assert "60.00 ± 0.00" in told(console)


@pytest.fixture
def search(tiny, monkeypatch):
    """A search with made-up scores, at the edge of one grid; and what it ran."""
    tuning = Tuning(
        tune_seeds=2,
        tune_learning_rates=(0.1, 0.2),
        tune_weight_decays=(2.5e-5, 1e-4),
        tune_swa_lrs=(0.01, 0.02),
    )
    ran = []

    def made_up(tuner, trainer, arm, parent):
        ran.append(tune._setting(trainer.config, arm))
        rate, decay = _rates(trainer.config)
        # The larger the decay the better, and rates near 0.2 and 0.02.
        score = decay - abs(math.log(rate / 0.2))
        score -= abs(math.log(trainer.config.protocol.swa_lr / 0.02))
        # A seed that diverged is kept as well.
        losses = math.inf, math.sqrt(len(ran))
        return [
            tune.Trial(label, *ran[-1], (score, 0.5), losses)
            for label in tune._tuned_labels(arm)
        ]

    monkeypatch.setattr(tune._Tuner, "_train", made_up)
    return tiny, tuning, ran


def read_tuning(config):
    return json.loads((config.workdir / "tuning.json").read_text())


@pytest.mark.parametrize("stop", [0, 1, 7, 12])
def test_a_tuning_that_was_killed_goes_on_where_it_stopped(search, tmp_path, stop):
    config, tuning, ran = search
    whole = override(config, workdir=tmp_path / "whole")
    chosen = tune.tune(whole, tuning, quiet())
    expected, settings = read_tuning(whole), list(ran)
    assert len(settings) > 12
    ran.clear()

    made_up = tune._Tuner._train
    with pytest.MonkeyPatch.context() as patch:

        def killed(*args):
            if len(ran) == stop:
                raise KeyboardInterrupt
            return made_up(*args)

        patch.setattr(tune._Tuner, "_train", killed)
        with pytest.raises(KeyboardInterrupt):
            tune.tune(config, tuning, quiet())
    written = read_tuning(config)
    assert written["chosen"] is None
    assert written["trials"] == expected["trials"][:stop]

    console = quiet()
    # What only says where things are may change, and the grids.
    again = override(config, log_every=7, keep_checkpoints=3)
    assert tune.tune(again, tuning, console) == chosen
    assert ran == settings  # each of them once
    finished = read_tuning(config)
    assert (finished["trials"], finished["chosen"]) == (
        expected["trials"],
        expected["chosen"],
    )
    assert finished.keys() == expected.keys()
    assert told(console).count("known from tuning.json") == stop

    tune.tune(config, tuning, quiet())  # finished: nothing is left to do
    assert ran == settings


def test_trials_of_another_grid_are_kept(search):
    config, tuning, ran = search
    tune.tune(config, tuning, quiet())
    before = read_tuning(config)["trials"]
    ran.clear()
    other = override(config, swa_lr=0.7)
    other_tuning = dataclasses.replace(tuning, tune_swa_lrs=(0.3,))
    tune.tune(other, other_tuning, quiet())
    assert ran
    assert {setting[0] for setting in ran} == {"swa1", "swa3"}  # plain ones are known
    after = read_tuning(config)["trials"]
    assert all(trial in after for trial in before)
    assert len(after) == len(before) + len(ran)


def test_tuning_of_other_settings_is_not_overwritten(search):
    config, tuning, ran = search
    tune.tune(config, tuning, quiet())
    before = (config.workdir / "tuning.json").read_bytes()
    ran.clear()
    other = override(config, epochs=5)
    other_tuning = dataclasses.replace(tuning, tune_seeds=3)
    with pytest.raises(
        StorageError, match=r"other settings: epochs was 4, now 5; tune_seeds was 2, n"
    ):
        tune.tune(other, other_tuning, quiet())
    assert not ran
    assert (config.workdir / "tuning.json").read_bytes() == before


@pytest.mark.parametrize("content", ["", "[]", '{"config": {}}', '{"trials": [3]}'])
def test_damaged_tuning_is_an_error(search, content):
    config, tuning, ran = search
    config.workdir.mkdir()
    (config.workdir / "tuning.json").write_text(content)
    with pytest.raises(StorageError, match=r"tuning\.json is damaged .* Move it away"):
        tune.tune(config, tuning, quiet())
    assert not ran


def test_where_nothing_can_be_written_no_trial_begins(search, splits_read):
    config, tuning, ran = search
    unwritable = override(config, workdir=pathlib.Path("/dev/null/run"))
    with pytest.raises(StorageError, match="workdir is /dev/null/run, which cannot"):
        tune.tune(unwritable, tuning, quiet())
    assert not ran
    assert not splits_read


def test_grid_that_ends_at_its_edge_is_told(search):
    config, tuning, _ = search
    console = quiet()
    tune.tune(config, tuning, console)
    shown = " ".join(told(console).split())
    # 1e-4 grew four times, by 4 each.
    assert "weight_decay: 0.0256, the best, is still at the edge" in shown
    assert "--tune-weight-decays" in shown
    assert "swa_lr: " not in shown


def trial(accuracy, loss):
    return tune.Trial("SGD", "sgd", 0.1, 0.0, None, None, (accuracy,), (loss,))


def test_equal_accuracies_are_told_apart_by_loss():
    worse, better = (tune.merit("accuracy", [trial(0.9, loss)]) for loss in (0.5, 0.4))
    assert better > worse


def test_text_is_judged_by_loss():
    scored_by = EXPERIMENTS["shakespeare"].config.data.scored_by
    worse, better = trial(0.9, 1.5), trial(0.8, 1.4)
    assert tune.merit(scored_by, [better]) > tune.merit(scored_by, [worse])


@pytest.mark.slow
def test_fine_tuning_tunes_the_control_too(
    tiny_fine_tune, fine_tune_tuning, monkeypatch
):
    monkeypatch.setattr(tune, "MAX_EXTENSIONS", 0)
    trained = []

    def recording(compiled, *args, **kwargs):
        trained.append(compiled.arm.name)
        return train(compiled, *args, **kwargs)

    monkeypatch.setattr(tune, "train", recording)
    chosen = tune.tune(tiny_fine_tune, fine_tune_tuning, quiet())
    assert chosen["control_lr"] == 0.01
    # The whole budget tunes the plain arm; the baseline is trained once for both.
    assert trained == ["sgd7", "converged", "swa", "control"]


def tuner(config, tuning):
    """A tuner, and the trainer that it would make of the configuration."""
    splits = load_splits(config.data, ("train", "validation"))
    record = tune.Record(config.directory, settings_of(config))
    made = Trainer(config, splits)
    return tune._Tuner(made, tuning, quiet(), record), made


def train_arm(config, tuning, name):
    """The trials of one arm."""
    found, made = tuner(config, tuning)
    arm = config.plan[name]
    return found._train(made, arm, config.plan.parent(arm))


def test_diverged_trial_is_never_the_best(tiny, tiny_tuning):
    config = override(tiny, learning_rate=1e30, swa_lr=1e30)
    (found,) = train_arm(config, tiny_tuning, "sgd")
    assert (found.accuracy, found.loss) == ((0.0,), (math.inf,))


@pytest.mark.parametrize("text", ["not finite", "by class, not by text"])
def test_average_that_the_batch_norm_pass_rejects_has_diverged(
    tiny, tiny_tuning, monkeypatch, text
):
    def rejects(kind):
        def recompute(*args):
            raise kind(text)

        monkeypatch.setattr(swa_jax, "recompute_batch_stats", recompute)

    rejects(swa_jax.NonFiniteError)
    (found,) = train_arm(tiny, tiny_tuning, "swa1")
    assert (found.accuracy, found.loss) == ((0.0,), (math.inf,))
    rejects(ValueError)  # a mistake of the program
    with pytest.raises(ValueError, match=text):
        train_arm(tiny, tiny_tuning, "swa1")


def test_tuning_and_training_keep_out_of_each_others_directory(search):
    config, tuning, ran = search
    settings, directory = settings_of(config), config.directory
    with (
        directory.locked(settings, FREE),
        pytest.raises(StorageError, match="is in use by another job"),
    ):
        tune.tune(config, tuning, quiet())
    assert not ran
    made_up = tune._Tuner._train

    def training_meanwhile(*args):
        with (
            pytest.raises(StorageError, match="is in use by another job"),
            directory.locked(settings, FREE),
        ):
            pytest.fail("the tuning is at work there")
        return made_up(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune._Tuner, "_train", training_meanwhile)
        tune.tune(config, tuning, quiet())
    assert ran
    # The directory is free again, and not claimed for the settings of the tuning.
    with directory.locked({**settings, "learning_rate": 0.7}, FREE):
        pass


def test_loss_that_is_no_number_has_diverged(tiny, tiny_tuning, monkeypatch):
    nothing = tune.Evaluation(0.9, math.nan, 0.1)
    monkeypatch.setattr(tune.Scorer, "score", lambda *args: nothing)
    (found,) = train_arm(tiny, tiny_tuning, "sgd")
    assert (found.accuracy, found.loss) == ((0.0,), (math.inf,))


def test_parent_that_diverges_takes_its_children_with_it(
    tiny_fine_tune, fine_tune_tuning
):
    config = override(tiny_fine_tune, learning_rate=1e30)
    for name, count in (("swa", 2), ("control", 2)):
        found = train_arm(config, fine_tune_tuning, name)
        assert [trial.loss for trial in found] == [(math.inf,)] * count


def test_what_a_tuning_shows_begins_with_a_header(search):
    config, tuning, _ = search
    console = quiet()
    tune.tune(config, tuning, console)
    shown = told(console).splitlines()
    assert shown[0] == "digits: trials, scored on the validation split"
    assert shown[1].startswith("arm  lr  weight decay  swa_lr")
    assert shown[2].startswith("SGD  0.1  2.5e-05  ")
