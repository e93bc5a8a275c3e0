"""The main job: train every arm with every seed, and score them on the test split."""

import time

import rich.console

from experiments import data, plans, processes, results
from experiments.checkpoints import open_workdir
from experiments.metrics import open_log
from experiments.plans import Arm
from experiments.preemption import stop_on_signal
from experiments.progress import progress_bar
from experiments.results import Row
from experiments.runs import Outputs, Scorer, Scores, execute, finished_scores
from experiments.settings import Config
from experiments.train import CompiledArm, compile_arm
from experiments.watch import write_figures


def train_and_evaluate(config: Config, console: rich.console.Console) -> list[Row]:
    """Run the whole comparison; write its files into `config.workdir`.

    Runs that are finished are kept, and a run that was stopped goes on where it was.

    Args:
        config: The experiment.
        console: Shows the progress bar and the tables.

    Returns:
        The rows of results.json.

    Raises:
        DataUnavailableError: The data set cannot be had, or not as asked for.
        StorageError: The work directory belongs to other settings or another job, or
            cannot be written or read.
        StoppedError: SIGTERM or Ctrl-C came; everything is saved.
    """
    arms = plans.make_arms(config)
    with open_workdir(config.workdir, results.config_dict(config)):
        complete = processes.from_main((config.workdir / "results.json").is_file)
        scores = {
            (arm.name, seed): finished_scores(config, arm, seed)
            for arm in arms
            for seed in range(config.seeds)
        }
        if complete and all(scores.values()):
            console.print(f"{config.workdir} holds a finished job.")
            return _conclude(config, arms, scores, console)
        started = time.monotonic()
        _run_all(config, arms, scores, console)
        rows = _conclude(config, arms, scores, console)
        console.print(f"{time.monotonic() - started:.0f} s; see {config.workdir}")
    return rows


def _run_all(
    config: Config,
    arms: tuple[Arm, ...],
    scores: dict[tuple[str, int], Scores | None],
    console: rich.console.Console,
) -> None:
    """Do the runs that have no scores yet; then draw the figures."""
    splits = data.load_splits(config, ("train", "test"))
    train_split = splits["train"]
    sizes = ", ".join(f"{s.num_examples:,} {name}" for name, s in splits.items())
    console.print(f"{config.name}: {sizes} examples of {train_split.source}")
    compiled = {arm.name: compile_arm(config, arm, train_split) for arm in arms}
    total = sum(arm.steps for arm in compiled.values()) * config.seeds
    with (
        stop_on_signal() as stopper,
        open_log(config.workdir, _header(config, compiled), processes.is_main()) as log,
        progress_bar(console, total, config.batch_size) as bar,
    ):
        outputs = Outputs(Scorer(config, splits), log, bar, stopper)
        # A seed at a time, so that a table can be built up seed by seed.
        for seed in range(config.seeds):
            for name, arm in compiled.items():
                if scores[name, seed] is not None:
                    bar.skip_run(f"{name} seed {seed}", arm.steps)
                    continue
                parent = compiled[arm.arm.parent] if arm.arm.parent else None
                scores[name, seed] = execute(
                    config, arm, seed, train_split, outputs, parent
                )
    write_figures(config, compiled, splits)


def _header(config: Config, compiled: dict[str, CompiledArm]) -> dict[str, object]:
    """The first line of metrics.jsonl: all that figures need to know of a job."""
    arms = [
        {
            "name": name,
            "label": each.arm.label,
            "epochs": each.arm.epochs,
            "first_epoch": each.arm.first_epoch,
            "parent": each.arm.parent,
            "steps_per_epoch": each.steps_per_epoch,
            "averages_from": each.arm.averages_from,
        }
        for name, each in compiled.items()
    ]
    return {"config": results.config_dict(config), "arms": arms}


def _conclude(
    config: Config,
    arms: tuple[Arm, ...],
    scores: dict[tuple[str, int], Scores | None],
    console: rich.console.Console,
) -> list[Row]:
    """Write and show the tables."""
    rows = results.make_rows(arms)
    for (arm, label), row in rows.items():
        for seed in range(config.seeds):
            found = scores[arm, seed]
            assert found is not None
            row.add(found[label])
    table = list(rows.values())
    comparisons = results.compare(table, arms)
    results.write_results(config, table, comparisons)
    for shown in results.make_tables(config, table, comparisons):
        console.print(shown)
    return table
