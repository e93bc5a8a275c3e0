"""Command line: `python -m experiments [train|tune|report|export|benchmark] ...`."""

import dataclasses
import difflib
import functools
import logging
import pathlib
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn

import tyro

from experiments.config.named import EXPERIMENTS, Experiment
from experiments.config.schema import Config, Tuning, settings_of, shared_settings
from experiments.runtime import processes
from experiments.runtime.errors import StoppedError, explanation

# Everything else is imported once it is known what for: jobs take seconds to import.

PROG = "python -m experiments"
COMMANDS = {
    "train": "Train an experiment's arms side by side; `train` may be left out.",
    "tune": "Choose its learning rates on the validation split.",
    "report": "Show where a job is, and draw its figures anew.",
    "export": "Write the averaged network of a finished run to files.",
    "benchmark": "Measure what averaging costs.",
}


@dataclasses.dataclass(frozen=True)
class TuneJob:
    """An experiment, and what tuning tries."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    tuning: Tuning
    """What tuning tries."""


@dataclasses.dataclass(frozen=True)
class ReportJob:
    """Show where a job is, and draw its figures anew."""

    workdir: tyro.conf.Positional[pathlib.Path]
    """Of the job to look at, finished or at work."""

    width: bool = True
    """Measure what width.png shows, if that is yet to be done; takes minutes."""


@dataclasses.dataclass(frozen=True)
class ExportJob:
    """Write the averaged network of a finished run to files."""

    workdir: tyro.conf.Positional[pathlib.Path]
    """Of the job."""

    out: pathlib.Path | None = None
    """Directory to make. None: WORKDIR/export."""

    arm: str | None = None
    """An arm that averages. None: the one with the longest average."""

    seed: int = 0
    """Of the run."""


def main(args: Sequence[str] | None = None) -> int:
    """Run what the command line names; return the exit status."""
    words = list(sys.argv[1:] if args is None else args)
    if words and words[0] in EXPERIMENTS:
        words.insert(0, "train")
    if words[:1] == ["train"] and "--tune" in words:  # as it was called before
        words.remove("--tune")
        words[0] = "tune"
    command, *rest = words or [""]
    # Libraries announce what they do at every save; what matters is raised.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    if command in ("train", "tune"):
        job = _parse(command, *_experiment(command, rest))
        run = functools.partial(_run, job)
    elif command == "report":
        job = tyro.cli(ReportJob, prog=f"{PROG} report", args=rest)
        run = functools.partial(_report, job)
    elif command == "export":
        job = tyro.cli(ExportJob, prog=f"{PROG} export", args=rest)
        run = functools.partial(_export, job)
    elif command == "benchmark":
        from experiments.benchmark.__main__ import main as benchmark

        return benchmark(rest)
    elif command in ("-h", "--help"):
        print(_help())
        return 0
    else:
        _mistaken(
            command,
            [*COMMANDS, *EXPERIMENTS],
            "command or experiment",
            lambda near: [near, *rest],
        )
    return _guarded(run)


def _guarded(run: Callable[[], None]) -> int:
    """Run, and tell in a line what a user can mend."""
    try:
        run()
    except StoppedError as error:
        _complain(str(error))
        return 128 + error.signum
    except KeyboardInterrupt:  # nothing is trained yet, or Ctrl-C came twice
        _complain(
            "interrupted; the same command goes on from the last checkpoint, if there"
            " is one."
        )
        return 128 + signal.SIGINT
    except Exception as error:
        text = explanation(error)
        if text is None:
            raise
        _complain(f"error: {text}")
        return 1
    return 0


def _complain(text: str) -> None:
    if processes.is_main():
        print(text, file=sys.stderr)


def _help() -> str:
    """What there is to call."""
    experiments = {name: found.summary for name, found in EXPERIMENTS.items()}
    lines = [f"usage: {PROG} [COMMAND] [ARGUMENTS]", "", "commands:"]
    lines += [f"  {name:10} {text}" for name, text in COMMANDS.items()]
    lines += ["", "experiments, for `train` and `tune`:"]
    lines += [f"  • {name} {text}" for name, text in _padded(experiments)]
    lines += ["", f"Their settings: {PROG} NAME --help"]
    return "\n".join(lines)


def _padded(texts: dict[str, str]) -> list[tuple[str, str]]:
    width = max(map(len, texts))
    return [(name.ljust(width), text) for name, text in texts.items()]


def _experiment(command: str, words: Sequence[str]) -> tuple[Experiment, Sequence[str]]:
    """The experiment that the first word names, and the other words."""
    name, *rest = words or [""]
    if name in ("-h", "--help"):
        print(_help())
        sys.exit(0)
    if name not in EXPERIMENTS:
        _mistaken(
            name, list(EXPERIMENTS), "experiment", lambda near: [command, near, *rest]
        )
    return EXPERIMENTS[name], rest


def _parse(command: str, experiment: Experiment, words: Sequence[str]) -> Any:
    """The settings, of which those on the command line replace the experiment's."""
    job: Any = experiment.config
    names = set(settings_of(job)) - {"name", "decay_all"}
    if command == "tune":
        job = TuneJob(job, experiment.tuning)
        names |= vars(experiment.tuning).keys()
    flags = {f"--{name.replace('_', '-')}" for name in names} | {"--help"}
    flags |= {flag.replace("--", "--no-", 1) for flag in flags}
    name = experiment.config.name
    for number, word in enumerate(words):
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-")
        if flag.startswith("--") and flag not in flags:
            call = [name] if command == "train" else [command, name]
            before, after = [*call, *words[:number]], words[number + 1 :]
            _mistaken(
                flag,
                sorted(flags),
                f"setting of {name}",
                lambda near: [*before, f"{near}{equals}{value}", *after],  # noqa: B023
                call,
            )
    return tyro.cli(
        type(job),
        default=job,
        prog=f"{PROG} {command} {name}",
        description=experiment.text,
        args=words,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.OmitArgPrefixes),
    )


def _mistaken(
    word: str,
    known: Sequence[str],
    what: str,
    corrected: Callable[[str], Sequence[str]],
    place: Sequence[str] = (),
) -> NoReturn:
    """Say that `word` is not known, and what to type instead."""
    near = difflib.get_close_matches(word, known, 1)
    if not word:
        text = f"{what} missing; there are {', '.join(known)}."
    elif near:
        call = shlex.join(corrected(near[0]))
        text = f"{word} is no {what}. Did you mean\n  {PROG} {call}"
    else:
        text = f"{word} is no {what}. See {' '.join((PROG, *place))} --help"
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


def _run(job: Config | TuneJob) -> None:
    config = job.config if isinstance(job, TuneJob) else job
    if not config.cluster.distributed and not config.cluster.process_id:
        print(f"{config.name}: work directory {config.workdir}", flush=True)
    import rich.console

    with processes.job(config.cluster):
        processes.check_same(shared_settings(config))
        console = rich.console.Console(quiet=not processes.is_main())
        if isinstance(job, TuneJob):
            from experiments.jobs.tune import tune

            tune(config, job.tuning, console)
        else:
            from experiments.jobs.main import train_and_evaluate
            from experiments.reporting.report import conclude

            if train_and_evaluate(config, console):
                conclude(config.directory, console)


def _report(job: ReportJob) -> None:
    import rich.console

    from experiments.reporting.report import report

    report(job.workdir, rich.console.Console(), width=job.width)


def _export(job: ExportJob) -> None:
    from experiments.reporting.export import export

    print(f"exporting from {job.workdir}", flush=True)
    out, found = export(job.workdir, job.out, job.arm, job.seed)
    percent, loss = 100 * float(found["test_accuracy"]), float(found["test_loss"])
    print(
        f"{out}/orbax and {out}/model.safetensors: {found['arm']} seed {found['seed']},"
        f" test accuracy {percent:.2f} %, test loss {loss:.4f}"
    )


if __name__ == "__main__":
    sys.exit(main())
