"""``python -m swa_jax average OUT IN...``: averages checkpoints on disk."""

import argparse
import pathlib
import re
import sys
from collections.abc import Callable, Sequence

from swa_jax.averages.checkpoints import average_checkpoints
from swa_jax.averages.soups import decay_weights


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status: 0, or 2 for what cannot be done."""
    args = _parser().parse_args(arguments)
    try:
        paths = _latest(args.inputs, args.last)
        weights = args.weights
        if args.decay is not None:
            weights = decay_weights(args.decay, len(paths)).tolist()
        average_checkpoints(
            paths,
            args.output,
            weights=weights,
            keys=_matching(args.keys) if args.keys else None,
            dtype=args.dtype,
            progress=_Bar() if sys.stderr.isatty() else None,
        )
    except (OSError, ValueError, TypeError) as error:
        print(f"swa_jax average: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: the average of {', '.join(map(str, paths))}")
    return 0


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
        help="checkpoints, or with --last directories of them",
    )
    add(
        "--last",
        metavar="N",
        type=int,
        help="only the N with the largest numbers in their names",
    )
    which = average.add_mutually_exclusive_group()
    which.add_argument(
        "--weights",
        metavar="W",
        nargs="+",
        type=float,
        help="a number for each checkpoint; divided by their sum, also negative",
    )
    which.add_argument(
        "--decay",
        metavar="NAME",
        help="weights that stand for a decay of the rate: linear, cosine or 1-sqrt; "
        "the oldest checkpoint comes first",
    )
    add("--keys", metavar="REGEX", help="only tensors whose name this is found in")
    add("--dtype", help="of the floating tensors in the output, such as float32")
    return parser


def _matching(pattern: str) -> Callable[[str], bool]:
    try:
        found = re.compile(pattern).search
    except re.error as error:
        raise ValueError(f"--keys {pattern}: no regular expression: {error}") from None
    return lambda name: found(name) is not None


def _latest(inputs: list[pathlib.Path], number: int | None) -> list[pathlib.Path]:
    """The checkpoints to take, the oldest first."""
    if number is None:
        return inputs
    if number < 1:
        raise ValueError(f"--last must be at least 1, got {number}")
    found = [path for each in inputs for path in _inside(each)]
    numbered = [(int(_NUMBER.findall(p.name)[-1]), p) for p in found if _has_number(p)]
    if len(numbered) < number:
        raise ValueError(
            f"--last {number}: found {len(numbered)} checkpoints with a number in "
            f"their names, among {', '.join(map(str, inputs))}"
        )
    return [path for _, path in sorted(numbered)[-number:]]


_NUMBER = re.compile(r"\d+")


def _has_number(path: pathlib.Path) -> bool:
    return bool(_NUMBER.search(path.name))


def _inside(path: pathlib.Path) -> list[pathlib.Path]:
    """A checkpoint, or those in a directory that is none itself."""
    if not path.is_dir() or any(path.glob("model*.safetensors*")):
        return [path]
    hidden = (p for p in path.iterdir() if not p.name.startswith("."))
    return [p for p in hidden if p.is_dir() or p.suffix == ".safetensors"]


class _Bar:
    """A line that tells how far it is."""

    def __call__(self, done: int, total: int) -> None:
        share = done / total if total else 1.0
        filled = "#" * round(30 * share)
        end = "\n" if done == total else ""
        text = f"\r[{filled:<30}] {share:4.0%} of {total:,} bytes"
        print(text, end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
