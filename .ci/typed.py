"""Fails unless a type checker knows the types of all public names of swa_jax."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

#: A subclass of a class of Keras, which publishes no types.
UNKNOWN = {"swa_jax.frameworks.keras.AverageWeights"}


def main() -> int:
    """Asks pyright, which looks for the package beside the first Python in PATH."""
    here = pathlib.Path(sys.executable).parent
    command = [here / "basedpyright", "--verifytypes", "swa_jax", "--ignoreexternal"]
    path = f"{here}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as elsewhere:  # or it takes what lies here
        done = subprocess.run(
            [*command, "--outputjson"],
            env={**os.environ, "PATH": path},
            cwd=elsewhere,
            capture_output=True,
            text=True,
        )
    report = json.loads(done.stdout)["typeCompleteness"]
    symbols = [symbol for symbol in report["symbols"] if symbol["isExported"]]
    unknown = {s["name"] for s in symbols if not s["isTypeKnown"]}
    print(f"{len(symbols) - len(unknown)} of {len(symbols)} public names have a type")
    for name in sorted(unknown - UNKNOWN):
        print(f"without: {name}", file=sys.stderr)
    for name in sorted(UNKNOWN - unknown):
        print(f"has one by now, see UNKNOWN: {name}", file=sys.stderr)
    return int(unknown != UNKNOWN or not symbols)


if __name__ == "__main__":
    sys.exit(main())
