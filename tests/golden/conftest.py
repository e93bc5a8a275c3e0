"""The scripts in this folder need PyTorch: pytest must not import them."""

collect_ignore_glob = ["make_*.py"]
