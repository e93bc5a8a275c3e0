import dataclasses
import json
import subprocess
import sys

import pytest

from experiments import __main__
from experiments.config.named import DIGITS, EXPERIMENTS
from experiments.config.schema import override
from experiments.jobs import main as compare
from experiments.jobs import tune
from experiments.runtime.errors import DataUnavailableError, StorageError

# As in the fixture `tiny`, through the command line.
TINY = [
    "digits",
    *("--seeds", "2"),
    *("--train-examples", "20"),
    *("--epochs", "4"),
    *("--swa-epochs", "1", "3"),
    *("--batch-size", "8"),
    *("--eval-batch-size", "256"),
    *("--widths", "4", "4"),
    *("--strides", "2", "2"),
    *("--averages", "ema:0.9"),
]


@pytest.fixture
def run(tmp_path, data_dir):
    def run(name, *overrides):
        workdir = tmp_path / name
        places = ["--workdir", str(workdir), "--data-dir", str(data_dir)]
        assert __main__.main([*TINY, *places, *overrides]) == 0
        return workdir

    return run


def test_digits_end_to_end(run, capsys):
    workdir = run("first")
    assert {path.name for path in workdir.iterdir()} == {
        ".drawing.lock",
        ".lock",
        "config.json",
        "curves.png",
        "metrics.jsonl",
        "results.json",
        "results.md",
        "runs",
        "scores.png",
        "tensorboard",
        "width.json",
        "width.png",
    }
    results = json.loads((workdir / "results.json").read_text())
    assert [(row["arm"], row["weights"]) for row in results["rows"]] == [
        ("sgd", "iterate"),
        ("swa1", "average"),
        ("swa3", "average"),
        ("swa3", "average, statistics averaged along"),
        ("swa3", "average, no BatchNorm pass"),
        ("swa3", "iterate"),
        ("swa3", "ema:0.9"),
    ]
    for row in results["rows"]:
        assert len(row["accuracy"]) == len(row["loss"]) == 2
        for accuracy in row["accuracy"]:
            # A fraction of all 601 test images, which fill no whole batch.
            assert 0 <= accuracy <= 1
            assert 601 * accuracy == pytest.approx(round(601 * accuracy), abs=1e-6)
    *_, with_pass, along, without, _, _ = (row["loss"] for row in results["rows"])
    assert with_pass != along != without != with_pass

    shown = capsys.readouterr().out
    assert "SWA, last 3 epochs" in shown
    assert "20 train, 601 test examples" in shown
    assert (workdir / "results.md").read_text().count("\n") == 18

    log = (workdir / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in log.splitlines()]
    reports = [
        (x["arm"], x["seed"], x["epoch"]) for x in lines if x["event"] == "train"
    ]
    assert reports == [
        (arm, seed, epoch)
        for seed in range(2)
        for arm in ("sgd", "swa1", "swa3")
        for epoch in range(1, 5)
    ]
    tests = [line for line in lines if line["event"] == "test"]
    # Of the first seed every epoch's, for the curves; of the others what is in tables.
    assert len([line for line in tests if line["seed"] == 1]) == 4
    tests = [line for line in tests if line["seed"] == 0]
    averages = [
        (line["arm"], line["epoch"]) for line in tests if line["weights"] == "average"
    ]
    assert averages == [("swa1", 4), ("swa3", 2), ("swa3", 3), ("swa3", 4)]
    # The last scores in the log are the first seed's in the results.
    last = {(line["arm"], line["weights"]): line["accuracy"] for line in tests}
    first_seed = [results["rows"][i]["accuracy"][0] for i in (0, 1, 2, 5)]
    assert first_seed == [
        last["sgd", "iterate"],
        last["swa1", "average"],
        last["swa3", "average"],
        last["swa3", "iterate"],
    ]

    # A seed's scores depend on no other seed and no other arm, and repeat exactly.
    alone = run("alone", "--seeds", "1", "--swa-epochs", "3")
    repeated = json.loads((alone / "results.json").read_text())["rows"]
    for row, first in zip(
        repeated, [results["rows"][i] for i in (0, 2, 3, 4, 5, 6)], strict=True
    ):
        assert row["accuracy"] == first["accuracy"][:1]
        assert row["loss"] == first["loss"][:1]


@pytest.mark.parametrize("old", [False, True])
def test_tune_is_a_command(monkeypatch, old):
    seen = []
    monkeypatch.setattr(tune, "tune", lambda *args: seen.append(args[:2]))
    words = [*TINY[1:], "--tune-seeds", "1", "--swa-lr", "0.3"]
    words = ["digits", *words, "--tune"] if old else ["tune", "digits", *words]
    assert __main__.main(words) == 0
    ((config, tuning),) = seen
    assert config == override(
        DIGITS,
        seeds=2,
        train_examples=20,
        averages=("ema:0.9",),
        epochs=4,
        swa_epochs=(1, 3),
        batch_size=8,
        eval_batch_size=256,
        widths=(4, 4),
        strides=(2, 2),
        swa_lr=0.3,
    )
    assert tuning == dataclasses.replace(EXPERIMENTS["digits"].tuning, tune_seeds=1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["digits", "--epoch", "3"],
            "--epoch is no setting of digits. Did you mean\n"
            "  python -m experiments digits --epochs 3",
        ),
        (
            ["tune", "digits", "--tune_swalrs", "3"],
            "Did you mean\n  python -m experiments tune digits --tune-swa-lrs 3",
        ),
        (
            ["digitz", "--epochs", "3"],
            "digitz is no command or experiment. Did you mean\n"
            "  python -m experiments digits --epochs 3",
        ),
        (
            ["tune", "fashion"],
            "Did you mean\n  python -m experiments tune fashion_mnist",
        ),
        (["reprot", "runs/x"], "Did you mean\n  python -m experiments report runs/x"),
        (["digits", "--context", "64"], "--context is no setting of digits"),
        (["digits", "--zzz"], "See python -m experiments digits --help"),
        (["train"], "experiment missing; there are digits, digits_nnx, fashion_mnist"),
        (["digits", "--epochs", "many"], "many"),
        (["digits", "--epochs", "7"], "swa_epochs contains 10 with epochs=7"),
        (["digits", "--parallel", "vmap"], "vmap"),
        (["digits", "--num-processes", "2"], "give all three, or none of them"),
        (
            [],
            "command or experiment missing; there are train, tune, report, export, b",
        ),
    ],
)
def test_mistakes_on_the_command_line_are_errors(args, message, capsys):
    with pytest.raises(SystemExit) as caught:
        __main__.main(args)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind", [DataUnavailableError, FloatingPointError, StorageError]
)
def test_expected_failures_come_without_a_traceback(kind, monkeypatch, capsys):
    def fail(config, console):
        raise kind("what to do")

    monkeypatch.setattr(compare, "train_and_evaluate", fail)
    assert __main__.main(["fashion_mnist"]) == 1
    assert capsys.readouterr().err == "error: what to do\n"


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (NotADirectoryError(20, "Not a directory", "/f/x"), "/f/x cannot be used (Not"),
        (PermissionError(13, "Permission denied", "/etc/x"), "/etc/x cannot be used ("),
        (OSError(30, "Read-only file system", "/usr/x"), "/usr/x cannot be used (Read"),
        (
            OSError(28, "No space left on device", "/w/x"),
            "no room to write ([Errno 28]",
        ),
    ],
)
def test_path_that_cannot_be_used_is_named_in_one_line(
    error, shown, monkeypatch, capsys
):
    def fail(config, console):
        raise error

    monkeypatch.setattr(compare, "train_and_evaluate", fail)
    assert __main__.main(["digits"]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"error: {shown}")
    assert message.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("x"), FileNotFoundError(2, "gone", "y")])
def test_mistakes_of_the_program_keep_their_traceback(error, monkeypatch):
    def fail(config, console):
        raise error

    monkeypatch.setattr(compare, "train_and_evaluate", fail)
    with pytest.raises(type(error)):
        __main__.main(["digits"])


def test_ctrl_c_before_training_is_one_line(monkeypatch, capsys):
    def interrupt(config, console):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "train_and_evaluate", interrupt)
    assert __main__.main(["digits"]) == 130
    message = capsys.readouterr().err
    assert message.startswith("interrupted; ")
    assert message.count("\n") == 1


def test_a_command_that_could_not_start_is_corrected(data_dir, tmp_path, capsys):
    """Its settings do not claim the work directory."""
    places = ["--workdir", str(tmp_path / "w"), "--data-dir", str(data_dir)]
    for count in ("5000", "6000"):
        assert __main__.main([*TINY, *places, "--train-examples", count]) == 1
        assert capsys.readouterr().err == (
            f"error: train_examples is {count}; the train split of Digits has 896. Ask"
            " for at most that many.\n"
        )


def test_help_lists_the_experiments():
    shown = subprocess.run(
        [sys.executable, "-m", "experiments", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in EXPERIMENTS:
        assert f"• {name} " in shown
    assert "python -m experiments" in shown


def test_arguments_are_read_before_anything_heavy_is_imported():
    """Help and typos are answered at once; jobs take seconds to import."""
    script = (
        "import sys, experiments.__main__ as main\n"
        "try:\n"
        "    main.main(['digits', '--help'])\n"
        "finally:\n"
        "    heavy = {'grain', 'tensorflow_datasets', 'orbax', 'scipy', 'sklearn',\n"
        "             'tensorboard', 'matplotlib', 'safetensors'}\n"
        "    print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stderr) == (0, "[]\n")
    assert "--swa-lr" in found.stdout


def test_help_shows_in_groups_what_applies(capsys):
    shown = {}
    for words in (["digits"], ["shakespeare"], ["tune", "shakespeare"]):
        with pytest.raises(SystemExit) as caught:
            __main__.main([*words, "--help"])
        assert caught.value.code == 0
        shown[words[-1] + words[0]] = capsys.readouterr().out
    digits, text, tuned = shown.values()
    for group in ("data", "model", "optimizer", "protocol", "saving", "cluster"):
        assert f"{group} options" in digits
    for flag in ("--widths", "--max-shift", "--swa-epochs", "--learning-rate"):
        assert flag in digits
    for flag in ("--layers", "--context", "--control-lr"):
        assert (flag in digits, flag in text) == (False, True)
    assert "--tune-control-lrs" in tuned
    for flag in ("--tune-", "--num-classes", "--axis-name", "--decay-all", "--name"):
        assert flag not in text


def test_first_line_comes_before_what_is_slow(monkeypatch, capsys):
    def fail(config, console):
        shown = capsys.readouterr().out
        assert shown == "digits: work directory runs/digits\n"
        raise StorageError("far enough")

    monkeypatch.setattr(compare, "train_and_evaluate", fail)
    assert __main__.main(["train", "digits"]) == 1
