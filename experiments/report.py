"""Figures and tables of a job, finished or at work: `python -m experiments.report DIR`.

Reads metrics.jsonl, and what else the work directory has by now; trains nothing and
needs no data.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

import rich.console
import rich.markdown
import rich.table

from experiments.curves import plot_curves
from experiments.files import write_atomic
from experiments.landscape import plot_width, read_width
from experiments.metrics import LogError, ParsedLog, read_log


def report(workdir: pathlib.Path, console: rich.console.Console) -> None:
    """Show where a job is, and draw its figures anew.

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
    width = read_width(workdir / "width.json")
    if width is not None:
        title = f"Around the solutions on {log.config['name']} (first seed)"
        write_atomic(workdir / "width.png", plot_width(width, title))
        written.append("width.png")
    console.print(f"{' and '.join(written)} written to {workdir}")


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
    try:
        report(parser.parse_args(args).workdir, rich.console.Console())
    except (LogError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
