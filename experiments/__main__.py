"""Command line: `python -m experiments NAME [--overrides]`."""

import logging
import signal
import sys
from collections.abc import Sequence

import tyro

from experiments import configs
from experiments.errors import StoppedError, explanation
from experiments.settings import Config


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
        _run(config)
    except StoppedError as error:
        _complain(str(error))
        return 128 + error.signum
    except KeyboardInterrupt:  # nothing is trained yet, or Ctrl-C came twice
        print(
            "interrupted; the same command goes on from the last checkpoint, if there"
            " is one.",
            file=sys.stderr,
        )
        return 128 + signal.SIGINT
    except Exception as error:
        text = explanation(error)
        if text is None:
            raise
        _complain(f"error: {text}")
        return 1
    return 0


def _run(config: Config) -> None:
    # Not before the arguments are read: JAX, Flax and all else take seconds.
    import rich.console

    from experiments import compare, processes, tune
    from experiments.results import config_dict

    with processes.job(config.cluster):
        processes.check_settings(config_dict(config))
        console = rich.console.Console(quiet=not processes.is_main())
        if config.tune:
            tune.tune(config, console)
        else:
            compare.train_and_evaluate(config, console)


def _complain(text: str) -> None:
    from experiments import processes

    if processes.is_main():
        print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
