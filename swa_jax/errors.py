"""Errors that code may want to react to, apart from wrong arguments."""


class NonFiniteError(ValueError):
    """A NaN or an infinity came out where a number was needed.

    Raised by ``recompute_batch_stats``, whose message names the leaf and the batch, and
    by ``average_checkpoints``, whose message names the checkpoint and the tensor.
    """


class CheckpointError(ValueError):
    """Checkpoints that cannot be averaged: damaged, foreign, or unlike each other.

    Raised by ``average_checkpoints`` before anything is written; the message names the
    file and the tensor.
    """
