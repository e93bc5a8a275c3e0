"""`python -m experiments.benchmark`."""

import dataclasses
import json
import platform
import sys
from collections.abc import Callable, Iterator, Sequence

import jax
import rich.console
import tyro

from experiments.benchmark.alone import bandwidth, profile
from experiments.benchmark.averages import averages
from experiments.benchmark.batch_norm import batch_norm_pass
from experiments.benchmark.checkpoints import checkpoints
from experiments.benchmark.importing import import_time
from experiments.benchmark.measuring import Line, Options, jax_threads
from experiments.benchmark.peers import peers
from experiments.benchmark.training import compile_time, training_steps
from experiments.runtime.files import write_json
from experiments.runtime.provenance import processor

SECTIONS: dict[str, Callable[[Options], Iterator[Line]]] = {
    "a": training_steps,
    "b": bandwidth,
    "c": peers,
    "d": batch_norm_pass,
    "e": compile_time,
    "f": import_time,
    "g": averages,
    "h": checkpoints,
    "p": profile,
}
#: What runs unless something else was asked for: h needs 14 GB of disk, p is a profile.
_USUAL = tuple(letter for letter in SECTIONS if letter not in "hp")


def machine() -> str:
    """This machine in a line."""
    return (
        f"{jax_threads()} cores of {processor()}, Python {platform.python_version()}, "
        f"jax {jax.__version__}, backend {jax.default_backend()}"
    )


def markdown(lines: Sequence[Line]) -> str:
    """The results as a table for the documentation."""
    rows = ["| | Ratio | Median | Quartiles | Target | |", "|---|---|---:|---|---|---|"]
    rows += [
        f"| {x.section} | {x.what} | {x.ratio:.3f} | {x.low:.3f} to {x.high:.3f} "
        f"| {x.target} | {x.note} |"
        for x in lines
    ]
    return "\n".join(rows) + "\n"


def main(args: Sequence[str] | None = None) -> int:
    """Measure, print, and write what the command line asks for."""
    options = tyro.cli(Options, prog="python -m experiments benchmark", args=args)
    console = rich.console.Console()
    console.print(machine())
    lines = []
    for letter in options.only or _USUAL:
        for line in SECTIONS[letter](options):
            console.print(f"({letter}) {line.what}: {line.ratio:.3f}")
            lines.append(line)
    print(markdown(lines))
    if options.output is not None:
        content = {
            "machine": machine(),
            "options": json.loads(json.dumps(dataclasses.asdict(options), default=str)),
            "lines": [dataclasses.asdict(line) for line in lines],
        }
        write_json(options.output, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
