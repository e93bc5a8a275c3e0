"""Batch statistics of a model as people hold it, one module a framework.

``swa_jax.recompute_batch_stats`` wants a function of parameters, statistics and batch.
The modules here make it from a model of Flax, Equinox, Haiku or Keras and put the
result back. They import their framework, and nothing imports them: name the one you
use, as in ``import swa_jax.frameworks.equinox``.
"""
