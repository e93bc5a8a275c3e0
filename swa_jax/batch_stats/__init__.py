"""Batch-normalisation statistics for weights that never ran in training mode.

Averaged weights see activations that no training step saw, so the running statistics
that training left behind do not fit them. One training-mode pass over the data gives
the ones that do. ``_leaves`` names the statistics, ``_forward`` runs the model from
chosen old values, ``_share`` reads from its outputs what each batch contributed, and
``_pass`` puts the batches together.
"""

from swa_jax.batch_stats._pass import recompute_batch_stats as recompute_batch_stats
