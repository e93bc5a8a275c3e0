"""Experiments that train real networks with swa_jax; run `python -m experiments`."""
