"""Failures that every process of a job finds at the same moment."""


class StorageError(RuntimeError):
    """Something on the disk is in the way; the message names it and says what to do."""


class StoppedError(RuntimeError):
    """The job was asked to end (SIGTERM); what it had done is saved."""
