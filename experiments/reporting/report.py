"""What a job leaves to look at: results.md, curves.png, width.png, and its state.

Reads what the work directory has by now; trains nothing.
"""

import os
import pathlib

import jax
import rich.console
import rich.markdown
import rich.table

from experiments.config.named import read_config
from experiments.config.schema import Config
from experiments.data.splits import load_splits
from experiments.jobs.main import Trainer
from experiments.jobs.run import finished
from experiments.jobs.width import measure_width
from experiments.reporting.budgets import plot_budgets
from experiments.reporting.curves import plot_curves
from experiments.reporting.scores import plot_scores
from experiments.reporting.tables import Results, make_markdown, make_tables
from experiments.reporting.width import plot_width, read_width
from experiments.runtime import processes
from experiments.runtime.errors import explanation
from experiments.runtime.files import write_atomic
from experiments.runtime.metrics import LoggedArm, ParsedLog, read_log
from experiments.runtime.workdir import Workdir


def conclude(directory: Workdir, console: rich.console.Console) -> None:
    """Show the tables of a job that is finished, and draw its figures.

    Of the processes of a job, only the main one does.
    """
    with directory.drawing():  # all of them: what it raises is raised in all
        if not processes.is_main():
            return
        _draw(directory, read_log(directory.metrics))
        for table in make_tables(Results.read(directory)):
            console.print(table)


def _draw(directory: Workdir, log: ParsedLog) -> list[str]:
    """Write what can be written from what is there; return the names of the files."""
    written = [directory.curves]
    write_atomic(directory.curves, plot_curves(log))
    if directory.results.is_file():
        results = Results.read(directory)
        write_atomic(directory.markdown, make_markdown(results).encode())
        path, figure = (
            (directory.budgets_figure, plot_budgets(results))
            if results.has_budgets
            else (directory.scores_figure, plot_scores(results))
        )
        write_atomic(path, figure)
        written.append(path)
    width = read_width(directory.width)
    if width is not None:
        figure = plot_width(width, log.config["name"])
        write_atomic(directory.width_figure, figure)
        written.append(directory.width_figure)
    return [path.name for path in written]


def report(
    workdir: pathlib.Path, console: rich.console.Console, *, width: bool = True
) -> None:
    """Show where a job is, and draw its figures anew.

    Args:
        workdir: Of the job, finished or at work.
        console: To show it on.
        width: Whether to measure what width.png shows, where that is yet to be done.
            Some minutes' work on a CPU; it needs the data set, and the checkpoints of
            the first seed's runs.

    Raises:
        StorageError: The directory has no log, or another report is at work there.
    """
    directory = Workdir(workdir)
    if not directory.results.exists() and "JAX_PLATFORMS" not in os.environ:
        # A job may be at work: the accelerators are its own.
        jax.config.update("jax_platforms", "cpu")
    log = read_log(directory.metrics)
    with directory.drawing():
        console.print(state_table(log))
        if directory.results.is_file():
            tables = make_markdown(Results.read(directory))
            console.print(rich.markdown.Markdown(tables))
        missing = None
        if read_width(directory.width) is None:
            missing = "it is yet to be measured, which --no-width leaves out"
            if width:
                missing = _measure(directory, console)
        written = _draw(directory, log)
    if missing is not None:
        console.print(f"width.png is missing: {missing}", soft_wrap=True, markup=False)
    console.print(f"{' and '.join(written)} written to {workdir}", soft_wrap=True)


def _measure(directory: Workdir, console: rich.console.Console) -> str | None:
    """Write width.json, or say why that cannot be."""
    try:
        config = read_config(directory.path)
        return _measure_width(config, console)
    except Exception as error:
        text = explanation(error)
        if text is None:
            raise
        return text


def _measure_width(config: Config, console: rich.console.Console) -> str | None:
    directory, plan = config.directory, config.plan
    arms = plan.baseline, plan.longest
    unfinished = [
        directory.run(arm.name, 0).name
        for arm in arms
        if finished(directory, arm, 0) is None
    ]
    if unfinished:
        return f"it needs {' and '.join(unfinished)}, not finished yet"
    console.print("measuring the loss around the solutions; --no-width leaves that out")
    splits = load_splits(config.data, ("train", "test"))
    trainer = Trainer(config.alone(), splits)
    plain, swa = map(trainer.compile, arms)
    scorer = trainer.scorer(config.data.width_examples)
    measure_width(directory, plain, swa, scorer, config.data.scored_by)
    return None


def state_table(log: ParsedLog) -> rich.table.Table:
    """How far each run is."""
    table = rich.table.Table(title=f"{log.config['name']}: runs")
    for title in ("run", "state", "batch loss", "test accuracy (%)", "test loss"):
        left = title in ("run", "state")
        table.add_column(title, justify="left" if left else "right")
    for arm in log.arms:
        for seed in range(log.config["seeds"]):
            table.add_row(f"{arm.name} seed {seed}", *_state(log, arm, seed))
    return table


def _state(log: ParsedLog, arm: LoggedArm, seed: int) -> tuple[str, ...]:
    name = arm.name
    epochs, tests = log.of("train", name, seed), log.of("test", name, seed)
    if log.of("finished", name, seed):
        state = "finished"
    elif epochs:
        state = f"epoch {epochs[-1]['epoch']} of {arm.epochs}"
    elif log.of("step", name, seed):
        state = f"epoch {arm.first_epoch + 1} of {arm.epochs}"
    else:
        return "not begun", "", "", ""
    loss = f"{epochs[-1]['batch_loss']:.4f}" if epochs else ""
    # Of an arm that averages, its average, once there is one.
    tests = [line for line in tests if line["weights"] == "average"] or tests
    if not tests:
        return state, loss, "", ""
    return state, loss, f"{100 * tests[-1]['accuracy']:.2f}", f"{tests[-1]['loss']:.4f}"
