"""``python -m swa_jax average OUT IN...``: averages checkpoints on disk."""

import argparse
import pathlib
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from swa_jax import _choosing
from swa_jax.averages.checkpoints import average_checkpoints
from swa_jax.averages.posthoc import posthoc_weights
from swa_jax.averages.soups import decay_weights


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status: 0, or 2 for what cannot be done."""
    args = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            paths, weights = _chosen(args)
        for warning in said:
            _complain(f"warning: {warning.message}")
        average_checkpoints(
            paths,
            args.output,
            weights=weights,
            keys=_matching(args.keys) if args.keys else None,
            dtype=args.dtype,
            progress=_Bar() if sys.stderr.isatty() else None,
        )
    except (OSError, ValueError, TypeError, ImportError) as error:
        _complain(error)
        return 2
    print(f"{args.output}: the average of {', '.join(map(str, paths))}")
    return 0


def _complain(message: object) -> None:
    print(f"swa_jax average: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m swa_jax", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    average = commands.add_parser(
        "average",
        help="average checkpoints",
        description=average_checkpoints.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = average.add_argument
    add("output", metavar="OUT", type=pathlib.Path, help="what to make; must not exist")
    add(
        "inputs",
        metavar="IN",
        nargs="+",
        type=pathlib.Path,
        help="checkpoints, or with --last, --best and --posthoc-sigma directories of "
        "them",
    )
    which = average.add_argument_group("which of them")
    which.add_argument(
        "--last",
        metavar="N",
        type=int,
        help="only the N with the largest numbers in their names",
    )
    which.add_argument(
        "--best",
        metavar="N",
        type=int,
        help="only the N with the largest --metric",
    )
    which.add_argument(
        "--metric",
        metavar="NAME",
        help="of --best: in the metrics of an Orbax CheckpointManager, in a JSON file "
        "metrics.json in a checkpoint's directory, or beside a file the same name with "
        ".json",
    )
    which.add_argument(
        "--smallest", action="store_true", help="with --best: the smallest instead"
    )
    how = average.add_argument_group("what each counts for; by default the same")
    how.add_argument(
        "--weights",
        metavar="W",
        nargs="+",
        type=float,
        help="a number for each checkpoint; divided by their sum, also negative",
    )
    how.add_argument(
        "--decay",
        metavar="NAME",
        help="weights that stand for a decay of the rate: linear, cosine or 1-sqrt; "
        "the oldest checkpoint comes first",
    )
    how.add_argument(
        "--posthoc-sigma",
        metavar="S",
        type=float,
        help="a power EMA of this width, from stored ones (swa_jax.posthoc_ema); their "
        "steps are the numbers in their names",
    )
    how.add_argument(
        "--sigmas",
        metavar="S",
        nargs="+",
        type=float,
        help="with --posthoc-sigma: the width of each IN",
    )
    how.add_argument(
        "--step",
        metavar="T",
        type=float,
        help="with --posthoc-sigma: the step it is wanted for; by default the last",
    )
    add("--keys", metavar="REGEX", help="only tensors whose name this is found in")
    add("--dtype", help="of the floating tensors in the output, such as float32")
    return parser


def _chosen(args: Any) -> tuple[list[pathlib.Path], list[float] | None]:
    """The checkpoints to take, the oldest first, and what each counts for."""
    _check_together(args)
    if args.posthoc_sigma is not None:
        return _posthoc(args)
    paths = args.inputs
    if args.last is not None:
        paths = _choosing.latest(paths, args.last)
    elif args.best is not None:
        paths = _choosing.best(paths, args.best, args.metric, args.smallest)
    if args.decay is not None:
        return paths, decay_weights(args.decay, len(paths)).tolist()
    return paths, args.weights


def _check_together(args: Any) -> None:
    """Raises for options that exclude each other, or need another."""

    def given(name: str) -> bool:
        value = getattr(args, name[2:].replace("-", "_"))
        return value is not None and value is not False

    for names in (
        ("--last", "--best", "--posthoc-sigma"),
        ("--weights", "--decay", "--posthoc-sigma"),
    ):
        if len(both := [name for name in names if given(name)]) > 1:
            raise ValueError(f"{both[0]} and {both[1]} exclude each other; give one")
    for name, needed in {
        "--best": "--metric",
        "--metric": "--best",
        "--smallest": "--best",
        "--posthoc-sigma": "--sigmas",
        "--sigmas": "--posthoc-sigma",
        "--step": "--posthoc-sigma",
    }.items():
        if given(name) and not given(needed):
            raise ValueError(f"{name} needs {needed} as well")


def _posthoc(args: Any) -> tuple[list[pathlib.Path], list[float]]:
    """The stored averages that the wanted one is made of, and their weights."""
    if len(args.sigmas) != len(args.inputs):
        raise ValueError(
            f"--sigmas has {len(args.sigmas)} numbers for {len(args.inputs)} IN; give "
            "the width of each, of a directory once"
        )
    found = _choosing.numbered(args.inputs)
    step = args.step
    if step is None:
        step = max((each.number for each in found), default=0)
    kinds = [(each.number, args.sigmas[each.source]) for each in found]
    used, weights = posthoc_weights(kinds, args.posthoc_sigma, step)
    return [found[i].path for i in used], weights.tolist()


def _matching(pattern: str) -> Callable[[str], bool]:
    try:
        found = re.compile(pattern).search
    except re.error as error:
        raise ValueError(f"--keys {pattern}: no regular expression: {error}") from None
    return lambda name: found(name) is not None


class _Bar:
    """A line that tells how far it is."""

    def __call__(self, done: int, total: int) -> None:
        share = done / total if total else 1.0
        filled = "#" * round(30 * share)
        end = "\n" if done == total else ""
        text = f"\r[{filled:<30}] {share:4.0%} of {total:,} bytes"
        print(text, end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    # An error like others, after which nothing is left behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
