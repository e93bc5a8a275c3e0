"""Checkpoints on disk, as named tensors that are read and written piece by piece."""

import pathlib

from swa_jax._formats._msgpack import MsgpackFile, is_msgpack
from swa_jax._formats._orbax import OrbaxStep, find_step
from swa_jax._formats._safetensors import INDEX, SafetensorsFile, SafetensorsShards
from swa_jax._formats._tensors import Checkpoint as Checkpoint
from swa_jax._formats._tensors import Spec as Spec
from swa_jax._formats._tensors import Writer as Writer
from swa_jax.errors import CheckpointError


def open_checkpoint(path: pathlib.Path) -> Checkpoint:
    """Opens a checkpoint, whatever its kind.

    Raises:
      FileNotFoundError: there is nothing at ``path``.
      CheckpointError: what is there is no checkpoint, or a damaged one.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or directory")
    if path.is_file():
        return MsgpackFile(path) if is_msgpack(path) else SafetensorsFile(path)
    if (path / INDEX).is_file():
        return SafetensorsShards(path)
    for name in ("model.safetensors", "flax_model.msgpack"):
        if (path / name).is_file():
            return open_checkpoint(path / name)
    step = find_step(path)
    if step is not None:
        return OrbaxStep(path, step)
    raise CheckpointError(
        f"{path}: a directory without model.safetensors, {INDEX}, flax_model.msgpack "
        "or an Orbax checkpoint; name a safetensors or msgpack file, a directory as "
        "Hugging Face's save_pretrained writes it, or an Orbax step or "
        "CheckpointManager's root"
    )
