"""Figures and tables of a job, finished or at work: `python -m experiments.report DIR`.

Reads metrics.jsonl, and what else the work directory has by now; trains nothing. Only
where width.png is yet to be measured does it need the data set, and the checkpoints of
the runs that are finished.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence

import jax
import rich.console
import rich.markdown
import rich.table

from experiments.curves import plot_curves
from experiments.errors import explanation
from experiments.files import write_atomic
from experiments.landscape import plot_width, read_width
from experiments.metrics import LogError, ParsedLog, read_log
from experiments.results import ConfigError, read_config


def report(
    workdir: pathlib.Path, console: rich.console.Console, *, measures: bool = True
) -> None:
    """Show where a job is, and draw its figures anew.

    Args:
        workdir: Of the job.
        console: To show it on.
        measures: Whether to measure what width.png shows, where that is yet to be done.
            Some minutes' work on a CPU.

    Raises:
        LogError: The directory has no log.
    """
    log = read_log(workdir / "metrics.jsonl")
    console.print(state_table(log))
    results = workdir / "results.md"
    if (workdir / "results.json").is_file() and results.is_file():
        console.print(rich.markdown.Markdown(results.read_text()))
    written = ["curves.png"]
    write_atomic(workdir / "curves.png", plot_curves(log))
    missing = _draw_width(workdir, log, console, measures)
    if missing is None:
        written.append("width.png")
    else:
        console.print(f"width.png is missing: {missing}", soft_wrap=True, markup=False)
    console.print(f"{' and '.join(written)} written to {workdir}")


def _draw_width(
    workdir: pathlib.Path, log: ParsedLog, console: rich.console.Console, measures: bool
) -> str | None:
    """Draw width.png, or say why there is none."""
    if read_width(workdir / "width.json") is None:
        if not measures:
            return "it is yet to be measured, which --no-width leaves out"
        missing = _measure_width(workdir, console)
        if missing is not None:
            return missing
    width = read_width(workdir / "width.json")
    assert width is not None
    title = f"Around the solutions on {log.config['name']} (first seed)"
    write_atomic(workdir / "width.png", plot_width(width, title))
    return None


def _measure_width(workdir: pathlib.Path, console: rich.console.Console) -> str | None:
    """Write width.json, or say why that cannot be."""
    from experiments import watch  # seconds of imports, needed only once a job

    try:
        config = read_config(workdir)
        unfinished = watch.unfinished_runs(config)
        if unfinished:
            return f"it needs {' and '.join(unfinished)}, not finished yet"
        console.print(
            "measuring the loss around the solutions; --no-width leaves that out"
        )
        watch.measure_width(config)
    except Exception as error:
        text = str(error) if isinstance(error, ConfigError) else explanation(error)
        if text is None:
            raise
        return text
    return None


def state_table(log: ParsedLog) -> rich.table.Table:
    """How far each run is."""
    table = rich.table.Table(title=f"{log.config['name']}: runs")
    for title in ("run", "state", "train loss", "test accuracy (%)", "test loss"):
        table.add_column(
            title, justify="left" if title in ("run", "state") else "right"
        )
    for arm in log.arms:
        for seed in range(log.config["seeds"]):
            table.add_row(f"{arm['name']} seed {seed}", *_state(log, arm, seed))
    return table


def _state(log: ParsedLog, arm: dict[str, object], seed: int) -> Sequence[str]:
    name = str(arm["name"])
    epochs, tests = log.of("train", name, seed), log.of("test", name, seed)
    if log.of("finished", name, seed):
        state = "finished"
    elif epochs:
        state = f"epoch {epochs[-1]['epoch']} of {arm['epochs']}"
    elif log.of("step", name, seed):
        state = f"epoch {int(str(arm['first_epoch'])) + 1} of {arm['epochs']}"
    else:
        return "not begun", "", "", ""
    loss = f"{epochs[-1]['loss']:.4f}" if epochs else ""
    # Of an arm that averages, its average, once there is one.
    tests = [line for line in tests if line["weights"] == "average"] or tests
    if not tests:
        return state, loss, "", ""
    return state, loss, f"{100 * tests[-1]['accuracy']:.2f}", f"{tests[-1]['loss']:.4f}"


def main(args: Sequence[str] | None = None) -> int:
    """Report on the work directory that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report",
        description="Show where a job is, and draw its figures anew.",
    )
    parser.add_argument("workdir", type=pathlib.Path, help="of the job to look at")
    parser.add_argument(
        "--no-width",
        action="store_true",
        help="do not measure what width.png shows, if that is yet to be done",
    )
    given = parser.parse_args(args)
    _leave_devices(given.workdir)
    try:
        report(given.workdir, rich.console.Console(), measures=not given.no_width)
    except (LogError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _leave_devices(workdir: pathlib.Path) -> None:
    """Keep to the CPU while a job may be at work: the accelerators are its own."""
    if not (workdir / "results.json").exists() and "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")


if __name__ == "__main__":
    sys.exit(main())
