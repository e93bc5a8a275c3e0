"""Failures that a user can mend: they are told in a line, without a traceback."""

import errno
import signal

NO_ROOM_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
# Of a path that cannot be used as it was asked for. A file that is missing is not
# among them: it may as well be a mistake in this program.
_PATH_ERRNOS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR),
    *(errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ESTALE),
}


class DataUnavailableError(RuntimeError):
    """A data set can be neither found nor prepared here; the message says how."""


class DataError(DataUnavailableError, ValueError):
    """Data that are here are damaged, or fewer than asked for; the message says so."""


class DevicesError(ValueError):
    """The settings do not fit this job's devices or processes; the message says how."""


class StorageError(RuntimeError):
    """Something on the disk is in the way; the message names it and says what to do."""


class StoppedError(RuntimeError):
    """The job was asked to end (SIGTERM, Ctrl-C); what it had done is saved."""

    def __init__(self, message: str, signum: int = signal.SIGTERM) -> None:
        """`signum` is the number of the signal that asked."""
        super().__init__(message)
        self.signum = signum


# Found by every process of a job at the same step, so that all may unwind.
COMMON_ERRORS = (DevicesError, FloatingPointError, StorageError, StoppedError)


def explanation(error: BaseException) -> str | None:
    """What to print instead of a traceback; None where only a traceback will do."""
    if isinstance(error, (*COMMON_ERRORS, DataUnavailableError)):
        return str(error)
    if not isinstance(error, OSError):
        return None
    if error.errno in NO_ROOM_ERRNOS:
        return (
            f"no room to write ({error}); free some and run the same command again."
            " Checkpoints are intact."
        )
    if error.errno in _PATH_ERRNOS and error.filename is not None:
        return (
            f"{error.filename} cannot be used ({error.strerror}); make it usable, or"
            " name another place, and run the same command again."
        )
    return None
