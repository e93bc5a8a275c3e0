"""Command line: `python -m experiments NAME [--overrides]`."""

import errno
import logging
import signal
import sys
from collections.abc import Sequence

import rich.console
import tyro

from experiments import configs, data, parallel, processes
from experiments.compare import train_and_evaluate
from experiments.errors import StoppedError, StorageError
from experiments.tune import tune


def main(args: Sequence[str] | None = None) -> int:
    """Run the experiment that the command line names; return the exit status."""
    config = tyro.extras.overridable_config_cli(
        configs.EXPERIMENTS,
        prog="python -m experiments",
        description="Train SGD and SWA side by side on real data.",
        args=args,
    )
    # Libraries announce what they do at every save; what matters is raised.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        with processes.job(config.cluster):
            console = rich.console.Console(quiet=not processes.is_main())
            if config.tune:
                tune(config, console)
            else:
                train_and_evaluate(config, console)
    except StoppedError as error:
        if processes.is_main():
            print(error, file=sys.stderr)
        return 128 + signal.SIGTERM
    except (
        data.DataUnavailableError,
        parallel.DevicesError,
        StorageError,
        FloatingPointError,
    ) as error:
        if processes.is_main():
            print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"error: no room to write ({error}); free some and run the same command"
            " again. Checkpoints are intact.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
