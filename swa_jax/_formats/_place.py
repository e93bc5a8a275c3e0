"""Files that appear whole, or not at all."""

import contextlib
import errno
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import IO


class Draft:
    """A file without a name, until it is finished.

    Where the file system knows such files (Linux), a process that is killed leaves no
    trace; elsewhere a name with a dot in front is used, and removed unless the process
    is killed outright.
    """

    def __init__(self, output: pathlib.Path) -> None:
        """Nothing yet."""
        self.output = output
        self._name: pathlib.Path | None = None  # where it has one after all
        self._file: IO[bytes] | None = None

    def open(self, size: int) -> IO[bytes]:
        """Opens it, with room for so many bytes.

        Raises:
          FileExistsError: something is there already.
          OSError: the disk has no room, or the directory cannot be written to.
        """
        folder = self.output.parent
        check_absent(self.output)
        try:
            flags = os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC
            self._file = os.fdopen(os.open(folder, flags, 0o666), "wb")
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_TMPFILE:
                raise
            handle, name = tempfile.mkstemp(".part", f".{self.output.name}.", folder)
            self._file, self._name = os.fdopen(handle, "wb"), pathlib.Path(name)
            os.umask(umask := os.umask(0))
            os.chmod(name, 0o666 & ~umask)  # as a file that was simply written
        with contextlib.suppress(AttributeError):
            try:
                os.posix_fallocate(self._file.fileno(), 0, size)
            except OSError as error:
                self.close()
                if error.errno == errno.ENOSPC:
                    free = shutil.disk_usage(folder).free
                    raise OSError(
                        errno.ENOSPC,
                        f"{self.output}: it needs {size:,} bytes, of which the disk "
                        f"has {free:,}",
                    ) from None
                if error.errno not in _NO_FALLOCATE:
                    raise
        return self._file

    def finish(self, output: pathlib.Path | None = None) -> None:
        """Gives it its name (or another, there), never another file's."""
        output = output or self.output
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._name is None:
            handle = self._file.fileno()
            # With a directory, though unused, for only then links are followed.
            os.link(f"/proc/self/fd/{handle}", output, src_dir_fd=handle)
        else:
            os.link(self._name, output)
        self.close()

    def close(self) -> None:
        """Forgets it, if it has not been finished."""
        if self._file is not None:
            self._file.close()
        if self._name is not None:
            self._name.unlink(missing_ok=True)


@contextlib.contextmanager
def hidden_folder(output: pathlib.Path) -> Iterator[pathlib.Path]:
    """An empty folder beside the output, gone afterwards.

    Of a process that was killed outright it stays, until the next for this output.

    Raises:
      FileExistsError: another process is writing this output.
    """
    folder = output.parent / f".{output.name}.part"
    folder.mkdir(exist_ok=True)
    with _locked(folder, output):
        try:
            for path in folder.iterdir():
                shutil.rmtree(path)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: pathlib.Path, output: pathlib.Path) -> Iterator[None]:
    """Keeps other processes out, where the system knows locks that die with one."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise FileExistsError(
            f"{output}: another process is writing it, in {folder}; wait, or name "
            "another output"
        ) from None
    finally:
        os.close(handle)


_NO_TMPFILE = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL}
_NO_FALLOCATE = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV}


def check_absent(output: pathlib.Path) -> None:
    """Raises if there is something, or nowhere to put it.

    Raises:
      FileExistsError: something is there already.
      FileNotFoundError: the directory around it is not there.
    """
    if os.path.lexists(output):
        raise FileExistsError(
            f"{output}: exists already; nothing is ever replaced, remove it or name "
            "another output"
        )
    if not output.parent.is_dir():
        raise FileNotFoundError(f"{output}: there is no directory {output.parent}")
