"""Errors that code may want to react to, apart from wrong arguments."""


class NonFiniteError(ValueError):
    """A NaN or an infinity came out where a number was needed.

    Raised by ``recompute_batch_stats``; the message names the leaf and the batch.
    """
