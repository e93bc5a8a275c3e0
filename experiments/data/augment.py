"""Random views of training images, and the one view of evaluation.

Every draw is made for the whole batch, whichever share of it a process gathers: an
image comes out as it would on one process.
"""

import io
import math
from typing import NamedTuple

import jax
import numpy as np
import PIL.Image


class Share(NamedTuple):
    """The rows of every batch that one process gathers: contiguous, its own alone."""

    process: int  # from 0
    processes: int  # divides the batch size

    def rows(self, batch_size: int) -> slice:
        """Where they are in a batch of the whole job."""
        size = batch_size // self.processes
        return slice(self.process * size, (self.process + 1) * size)


WHOLE = Share(0, 1)


def own_share() -> Share:
    """What this process gathers in its job."""
    return Share(jax.process_index(), jax.process_count())


def shift_and_flip(
    images: np.ndarray,
    rng: np.random.Generator,
    max_shift: int,
    flip: bool,
    share: Share = WHOLE,
) -> np.ndarray:
    """Shift each image by up to `max_shift` pixels, zeros moving in; mirror half.

    That is a random crop out of the image padded by `max_shift` zeros on each side.

    Args:
        images: [batch, height, width, channels], a share of a batch.
        rng: Draws for the whole batch.
        max_shift: In pixels.
        flip: Whether half of the images, chosen at random, are mirrored.
        share: Which part of the batch `images` is.
    """
    count, height, width, _ = images.shape
    whole = count * share.processes
    mine = share.rows(whole)
    pad = ((0, 0), (max_shift, max_shift), (max_shift, max_shift), (0, 0))
    padded = np.pad(images, pad)
    top, left = rng.integers(0, 2 * max_shift + 1, (2, whole, 1))[:, mine]
    rows, columns = top + np.arange(height), left + np.arange(width)
    if flip:
        mirrored = rng.random((whole, 1))[mine] < 0.5
        columns = np.where(mirrored, columns[:, ::-1], columns)
    every = np.arange(count)[:, None, None]
    return padded[every, rows[:, :, None], columns[:, None, :]]


def decode(content: bytes) -> PIL.Image.Image:
    """Decode a JPEG or PNG file, to RGB."""
    return PIL.Image.open(io.BytesIO(content)).convert("RGB")


# Draws of one random-resized crop: ten tries of (area, log aspect ratio, left, top),
# and whether to mirror.
CROP_TRIES = 10
CROP_DRAWS = 4 * CROP_TRIES + 1


def random_resized_crop(
    image: PIL.Image.Image, draws: np.ndarray, size: int, flip: bool
) -> np.ndarray:
    """A random part of an image, scaled to a square: ImageNet's training view.

    The part has 8 to 100 % of the area and an aspect ratio of 3/4 to 4/3 (Szegedy et
    al., arXiv:1409.4842, section 6); if ten tries find none that fits, the largest
    central one whose ratio is allowed.

    Args:
        image: RGB.
        draws: [CROP_DRAWS] uniform in [0, 1).
        size: Side of the result in pixels.
        flip: Whether to mirror it if the last draw is below one half.

    Returns:
        [size, size, 3] uint8.
    """
    box = _random_box(image.width, image.height, draws[:-1].reshape(-1, 4))
    view = image.resize((size, size), PIL.Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(view)
    return pixels[:, ::-1] if flip and draws[-1] < 0.5 else pixels


def _random_box(
    width: int, height: int, tries: np.ndarray
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom in pixels."""
    low, high = 3 / 4, 4 / 3
    for area, aspect, left, top in tries:
        area = width * height * (0.08 + 0.92 * area)
        ratio = math.exp(math.log(low) + math.log(high / low) * aspect)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(left * (width - w + 1)), int(top * (height - h + 1))
            return x, y, x + w, y + h
    w = min(width, round(height * high))
    h = min(height, round(width / low))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def centre_crop(image: PIL.Image.Image, size: int) -> np.ndarray:
    """The middle of an image, ImageNet's view for evaluation.

    The shorter side is scaled to 256/224 of `size`, of which the central square is cut.

    Returns:
        [size, size, 3] uint8.
    """
    # In pixels of the image itself, so that one resize does both.
    side = min(image.width, image.height) * 224 / 256
    x, y = (image.width - side) / 2, (image.height - side) / 2
    box = (x, y, x + side, y + side)
    return np.asarray(image.resize((size, size), PIL.Image.Resampling.BILINEAR, box))
