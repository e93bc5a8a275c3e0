"""What averaging costs: `python -m experiments.benchmark`.

Everything is a ratio of two measurements taken in turns in this one run, so that what
else the machine does hits both alike. Each line gives the median over rounds and, as
spread, the first and third quartile. Nothing here is asserted: see tests for that.

PyTorch, timm and optax-swag are compared where they are installed (extra `benchmark`).
`--only p` says instead where the time of `update_average` goes.
"""
