import io

import numpy as np
import PIL.Image
import pytest

from experiments.data import augment


def gradient(width, height):
    """An image whose red grows to the right and whose green grows downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return PIL.Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))


def test_decode_gives_rgb():
    buffer = io.BytesIO()
    PIL.Image.new("L", (5, 3), 77).save(buffer, "png")
    image = augment.decode(buffer.getvalue())
    assert (image.mode, image.size) == ("RGB", (5, 3))
    assert image.getpixel((4, 2)) == (77, 77, 77)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (300, 800), (64, 64)])
def test_random_boxes_have_the_published_areas_and_ratios(width, height):
    rng = np.random.default_rng(0)
    areas, ratios, edges = [], [], []
    for _ in range(2000):
        left, top, right, bottom = augment._random_box(
            width, height, rng.random((augment.CROP_TRIES, 4))
        )
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        areas.append((right - left) * (bottom - top) / (width * height))
        ratios.append((right - left) / (bottom - top))
        edges.append((left == 0, right == width))
    # Sides are whole pixels, so both may be off by a pixel's worth.
    slack = 3 / min(width, height) / 0.08**0.5
    assert 0.08 * (1 - slack) <= min(areas) < 0.1
    # Of a narrow strip, no large part has an allowed ratio.
    assert max(areas) > (0.9 if width == height else 0.45)
    assert 3 / 4 * (1 - slack) <= min(ratios)
    assert max(ratios) <= 4 / 3 * (1 + slack)
    # Positions reach both edges.
    assert all(np.any(edges, axis=0))


def test_where_no_box_fits_the_middle_is_taken():
    # Area 100 % at a ratio of 4/3 fits into no square.
    hopeless = np.tile([0.9999, 0.9999, 0.0, 0.0], (augment.CROP_TRIES, 1))
    assert augment._random_box(100, 100, hopeless) == (0, 0, 100, 100)
    # A strip: the largest part whose ratio is allowed, 4/3, in the middle.
    assert augment._random_box(1000, 90, hopeless) == (440, 0, 560, 90)


def test_crop_shows_the_box_and_may_be_mirrored():
    image = gradient(200, 160)
    draws = np.random.default_rng(1).random(augment.CROP_DRAWS)
    box = augment._random_box(200, 160, draws[:-1].reshape(-1, 4))
    draws[-1] = 0.7
    plain = augment.random_resized_crop(image, draws, 32, flip=True)
    assert plain.shape == (32, 32, 3)
    assert plain.dtype == np.uint8
    # Red tells how far to the right a pixel was: its corners are the box's.
    left, top, right, bottom = box
    reds = plain[:, [0, -1], 0].mean(axis=0)
    np.testing.assert_allclose(reds, [255 * left / 199, 255 * right / 199], atol=6)
    greens = plain[[0, -1], :, 1].mean(axis=1)
    np.testing.assert_allclose(greens, [255 * top / 159, 255 * bottom / 159], atol=6)
    draws[-1] = 0.3
    mirrored = augment.random_resized_crop(image, draws, 32, flip=True)
    np.testing.assert_array_equal(mirrored, plain[:, ::-1])
    unflipped = augment.random_resized_crop(image, draws, 32, flip=False)
    np.testing.assert_array_equal(unflipped, plain)


def test_centre_crop_is_seven_eighths_of_the_shorter_side():
    view = augment.centre_crop(gradient(400, 256), 224)
    assert view.shape == (224, 224, 3)
    # 224 pixels of 256 downwards from 16, and of 400 to the right from 88.
    greens, reds = view[[0, -1], 100, 1], view[100, [0, -1], 0]
    expected = [255 * 16 / 255, 255 * 239 / 255]
    np.testing.assert_allclose(greens, expected, atol=2)
    expected = [255 * 88 / 399, 255 * 311 / 399]
    np.testing.assert_allclose(reds, expected, atol=2)
