"""Tests of augmentations: reproducibility, geometry and probabilities."""

import math

import numpy as np
import pytest

from distill_jax import registry
from distill_jax.augmentations import _pixels, crop, cutmix, flip, mixup, rand_augment
from distill_jax.errors import InputError

pytestmark = pytest.mark.smoke

W = 12


def example(seed=0, channels=1, label=3):
  pixels = np.random.default_rng(seed).integers(0, 256, (W, W, channels)).astype(np.uint8)
  return {
    "pixels_WWM": pixels,
    "labels_T": np.array([label], np.int32),
    "mask_T": np.array([True]),
  }


def flat(value, label=0):
  return example(label=label) | {"pixels_WWM": np.full((W, W, 1), value, np.uint8)}


def never():
  raise AssertionError("it asked for another example")


IMAGES = ["crop", "cutmix", "flip", "mixup", "rand_augment"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", IMAGES)
def test_augmentations_are_reproducible_and_do_not_change_their_input(name, channels):
  change = registry.load("augmentations", name).Augmentation()
  given, partner = example(channels=channels), example(9, channels, label=7)
  before = given["pixels_WWM"].copy()
  view = lambda n: change(np.random.default_rng([5, n]), given, lambda: partner)
  views = [view(n) for n in range(12)]
  for n, v in enumerate(views):
    assert v["pixels_WWM"].shape == before.shape and v["pixels_WWM"].dtype == np.uint8
    again = view(n)
    assert v.keys() == given.keys() and all(np.array_equal(v[k], again[k]) for k in v)
  np.testing.assert_array_equal(given["pixels_WWM"], before)
  if name != "crop":  # the defaults of crop do not change the image
    assert len({v["pixels_WWM"].tobytes() for v in views}) > 1


def test_flip_mirrors_half_of_the_images():
  change, given, rng = flip.Augmentation(0.3), example(), np.random.default_rng(0)
  mirrored = 0
  for _ in range(2_000):
    pixels = change(rng, given, never)["pixels_WWM"]
    if not np.array_equal(pixels, given["pixels_WWM"]):
      np.testing.assert_array_equal(pixels[:, ::-1], given["pixels_WWM"])
      mirrored += 1
  assert abs(mirrored / 2_000 - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 2_000)


def test_crops_of_a_padded_image_are_uniform_shifts():
  change, rng = crop.Augmentation(pad=2), np.random.default_rng(0)
  given, places = example() | {"pixels_WWM": np.zeros((W, W, 1), np.uint8)}, np.zeros((5, 5))
  given["pixels_WWM"][6, 6] = 255
  for _ in range(2_500):
    y, x, _ = np.argwhere(change(rng, given, never)["pixels_WWM"])[0]
    places[y - 4, x - 4] += 1
  assert places.sum() == 2_500
  assert np.abs(places / 100 - 1).max() < 4 / math.sqrt(100)


def test_crops_have_the_configured_area_and_ratio():
  # Gradients along x and y: the values in a crop show the size of its box.
  ramp = np.broadcast_to(np.arange(0, 240, 2, dtype=np.uint8), (120, 120))[..., None]
  change, rng = crop.Augmentation(area=0.3, ratio=2.0), np.random.default_rng(1)
  areas, ratios = [], []
  for _ in range(400):
    state = rng.bit_generator.state
    widths = []
    for pixels in (ramp, ramp.swapaxes(0, 1)):
      rng.bit_generator.state = state
      got = change(rng, {"pixels_WWM": pixels}, never)["pixels_WWM"].astype(float)
      widths.append((got.max() - got.min()) / 2 + 1)
    areas.append(widths[0] * widths[1] / 120**2)
    ratios.append(math.log(widths[0] / widths[1]))
  # Boxes have integer sizes of at most the width of the image.
  assert 0.28 < min(areas) < 0.35 and 0.9 < max(areas) <= 1
  assert -0.72 < min(ratios) < -0.5 and 0.5 < max(ratios) < 0.72


def test_mixup_is_the_weighted_mean_and_draws_labels_by_the_weight():
  change, rng, picked = mixup.Augmentation(1.0), np.random.default_rng(0), []
  for _ in range(3_000):
    got = change(rng, flat(0, 1), lambda: flat(200, 2))
    assert np.ptp(got["pixels_WWM"]) == 0
    picked.append((1 - got["pixels_WWM"][0, 0, 0] / 200, got["labels_T"][0] == 1))
  share, ours = np.array(picked).T
  # Beta(1, 1) is uniform. The label is a's with probability `share`, in every part of its range.
  assert abs(share.mean() - 0.5) < 4 * math.sqrt(1 / 12 / 3_000)
  for low in (0.0, 0.25, 0.5, 0.75):
    here = (share >= low) & (share < low + 0.25)
    n, p = here.sum(), share[here].mean()
    assert abs(ours[here].mean() - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_cutmix_pastes_a_box_and_draws_labels_by_visible_area():
  change, rng, picked = cutmix.Augmentation(), np.random.default_rng(0), []
  for _ in range(3_000):
    got = change(rng, flat(0, 1), lambda: flat(200, 2))
    there = np.argwhere(got["pixels_WWM"][..., 0])
    if len(there):
      (top, left), (bottom, right) = there.min(0), there.max(0)
      assert len(there) == (bottom - top + 1) * (right - left + 1)  # a box, all of it
    picked.append((1 - len(there) / W**2, got["labels_T"][0] == 1))
  share, ours = np.array(picked).T
  for low in (0.25, 0.5, 0.75):
    here = (share >= low) & (share < low + 0.25)
    n, p = here.sum(), share[here].mean()
    assert abs(ours[here].mean() - p) < 4 * math.sqrt(p * (1 - p) / n)
  assert 0.4 < share.mean() < 0.75  # lambda is uniform, and boxes are cut off at the edge
  rare = cutmix.Augmentation(p=0.0)(rng, flat(0, 1), never)
  assert not rare["pixels_WWM"].any()


def dot(x, y):
  """Returns a black image of 33 x 33 with a white square of 3 x 3 at an offset from the centre."""
  pixels = np.zeros((33, 33, 1), np.uint8)
  pixels[15 + y : 18 + y, 15 + x : 18 + x] = 255
  return pixels


def centre(pixels):
  """Returns the centre of mass, (x, y) relative to the centre of the image."""
  weight = pixels[..., 0] / pixels.sum()
  at = np.arange(33) - 16
  return np.array([(weight.sum(0) * at).sum(), (weight.sum(1) * at).sum()])


@pytest.mark.parametrize(
  "name, to",
  [
    # y points downwards, so a point right of the centre moves up.
    ("rotate", (9 * math.cos(math.pi / 12), -9 * math.sin(math.pi / 12))),
    ("translate_x", (9 - 0.15 * 33, 0)),
    ("translate_y", (9, -0.15 * 33)),
    ("shear_x", (9, 0)),
    ("shear_y", (9, -0.15 * 9)),
  ],
)
def test_warps_move_a_point_by_their_formula(name, to):
  got = centre(rand_augment.changed(dot(9, 0), name, 0.5))
  np.testing.assert_allclose(got, to, atol=0.1)  # a square of 3 x 3 is not a point


def test_shear_x_moves_a_point_below_the_middle():
  np.testing.assert_allclose(
    centre(rand_augment.changed(dot(0, 8), "shear_x", 0.5)), (-0.15 * 8, 8), atol=0.1
  )


def test_tone_changes_match_their_names():
  given = example(channels=3)["pixels_WWM"]
  of = lambda name, s: rand_augment.changed(given, name, s)
  np.testing.assert_array_equal(of("identity", 1.0), given)
  np.testing.assert_array_equal(of("posterize", -1.0), given & 0xF0)
  np.testing.assert_array_equal(of("solarize", 0.5), np.where(given < 128, given, 255 - given))
  # Pillow rounds down.
  np.testing.assert_allclose(of("brightness", -0.5), given * 0.55, atol=1)
  np.testing.assert_allclose(np.ptp(of("auto_contrast", 0.1), (0, 1)), 255, atol=1)


def test_rand_augment_draws_every_change():
  change, rng, seen = rand_augment.Augmentation(n=1), np.random.default_rng(0), set()
  given = example(channels=3)
  made = {
    rand_augment.changed(given["pixels_WWM"], name, s).tobytes()
    for name in rand_augment.CHANGES
    for s in (-0.9, 0.9)
  }
  for _ in range(600):
    seen.add(change(rng, given, never)["pixels_WWM"].tobytes())
  assert seen == made


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: flip.Augmentation(1.5), "p is 1.5"),
    (lambda: crop.Augmentation(area=0.0), r"area is 0\.0; expected a number above 0"),
    (lambda: crop.Augmentation(pad=-1), "pad is -1; expected at least 0"),
    (lambda: mixup.Augmentation(0.0), "alpha is 0.0"),
    (lambda: cutmix.Augmentation(p=-0.1), "p is -0.1"),
    (
      lambda: rand_augment.Augmentation(magnitude=11),
      "magnitude is 11; expected a number from 0 to 10",
    ),
  ],
)
def test_invalid_parameters_are_refused(make, message):
  with pytest.raises(InputError, match=message):
    make()


def test_the_identity_warp_returns_the_image():
  given = example(channels=3)["pixels_WWM"]
  np.testing.assert_array_equal(_pixels.warped(given, np.array([[1, 0, 0], [0, 1, 0]])), given)


@pytest.mark.parametrize("mix", [mixup.Augmentation(), cutmix.Augmentation(p=1.0)])
def test_pairs_are_not_mixed(mix):
  """A pair has a label for its image and one for its text, which cannot be mixed."""
  pair = {
    "pixels_WWM": np.zeros((4, 4, 1), np.uint8),
    "labels_T": np.zeros(2, np.int32),
    "mask_T": np.ones(2, bool),
  }
  with pytest.raises(InputError, match="need one label per example, but these examples have 2"):
    mix(np.random.default_rng(0), pair, lambda: pair)
