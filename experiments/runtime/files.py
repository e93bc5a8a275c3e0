"""Files that are whole or not there."""

import json
import os
import pathlib
import socket
from typing import Any

from experiments.runtime import processes


def write_atomic(path: pathlib.Path, content: bytes) -> None:
    """Write a file so that readers see the old content or the new, never a part.

    Of the processes of a job, only the main one writes.
    """
    if not processes.is_main():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    draft.write_bytes(content)
    os.replace(draft, path)


def write_json(path: pathlib.Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())
