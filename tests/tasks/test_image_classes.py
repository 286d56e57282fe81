"""Tests of reading labelled images, and of bad files."""

import dataclasses
import gzip
import tracemalloc

import numpy as np
import pytest
from PIL import Image
from tiny_images import NAMES, W, idx, write_folder, write_idx

from distill_jax.data import image_files, labelled_images
from distill_jax.errors import InputError
from distill_jax.models import vit
from distill_jax.tasks import image_classes


def task(folder, **changes):
  fields = {"train": str(folder), "classes": NAMES, "size": W, "channels": 1, **changes}
  return image_classes.Task(**fields)


def all_of(source):
  rows = [source[i] for i in range(len(source))]
  return np.stack([r["pixels_WWM"] for r in rows]), np.array([r["labels_T"][0] for r in rows])


@pytest.fixture
def idx_task(tmp_path):
  want = write_idx(tmp_path)
  return want, task(tmp_path / "train", heldout=str(tmp_path / "train"))


def test_idx_files_are_read_bit_for_bit(idx_task):
  (pixels, labels), made = idx_task
  source = made.open("train", None)
  got, got_labels = all_of(source)
  np.testing.assert_array_equal(got[..., 0], pixels)
  np.testing.assert_array_equal(got_labels, labels)
  row = source[0]
  assert row["labels_T"].dtype == np.int32 and row["mask_T"].tolist() == [True]
  assert (source.classes, source.positions, len(source)) == (3, 1, 40)


def test_a_folder_per_class_is_read_bit_for_bit_with_its_class_names(tmp_path):
  made = write_folder(tmp_path, channels=3)
  source = task(tmp_path, classes=(), channels=3, heldout=str(tmp_path)).open("train", None)
  got, labels = all_of(source)
  np.testing.assert_array_equal(got, np.concatenate([made[n] for n in NAMES]))
  np.testing.assert_array_equal(labels, np.repeat([0, 1, 2], 4))


def test_images_are_normalised_as_in_transformers(tmp_path):
  transformers = pytest.importorskip("transformers")
  made = write_folder(tmp_path, channels=3)
  t = task(tmp_path, channels=3, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), heldout=str(tmp_path))
  source = t.open("train", None)
  read = t.inputs(lambda name: np.stack([source[i][name] for i in range(3)])).pixels_BYWM
  hub = t.hub_files(None)["preprocessor_config.json"]
  kind = getattr(transformers, "ViTImageProcessorPil", transformers.ViTImageProcessor)
  theirs = kind(**{k: v for k, v in hub.items() if k != "image_processor_type"})
  images = [Image.fromarray(x) for x in made["ankle"][:3]]
  want = theirs(images, return_tensors="np")["pixel_values"]
  np.testing.assert_allclose(np.transpose(read, (0, 3, 1, 2)), want, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_with_16_bits_keeps_its_upper_8(channels, tmp_path):
  """65,535 is white, and 255 is almost black; Pillow alone would clip all above 255 to white."""
  grey = np.random.default_rng(0).integers(0, 2**16, (W, W)).astype(np.uint16)
  grey[0, :4] = 0, 255, 256, 2**16 - 1
  Image.fromarray(grey).save(tmp_path / "x.png")
  want = np.repeat((grey // 256)[..., None], channels, -1)
  with Image.open(tmp_path / "x.png") as image:
    assert image.mode.startswith("I")
    np.testing.assert_array_equal(labelled_images.ImageSpec(W, channels).pixels(image), want)
  got = image_files.decode((tmp_path / "x.png").read_bytes(), W, channels)
  np.testing.assert_array_equal(got, want)


def test_sizes_that_differ_are_bad_or_resized(tmp_path):
  write_folder(tmp_path)
  Image.new("L", (W + 2, W), 77).save(tmp_path / "bag" / "wide.png")
  with pytest.raises(InputError, match="bag/wide.png is not 12 x 12"):
    task(tmp_path).open("train", None)
  source = task(tmp_path, resize=True, heldout=str(tmp_path)).open("train", None)
  pixels, labels = all_of(source)
  assert len(labels) == 13 and np.any(np.all(pixels == 77, (1, 2, 3)))


def damaged(folder):
  (folder / "coat" / "9.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
  cut = (folder / "coat" / "0.png").read_bytes()[:-40]
  (folder / "coat" / "cut.png").write_bytes(cut)


def unknown(folder):
  (folder / "shoe").mkdir()
  Image.new("L", (W, W)).save(folder / "shoe" / "0.png")


def empty(folder):
  for file in (folder / "bag").iterdir():
    file.unlink()


@pytest.mark.parametrize(
  "spoil, why",
  [
    (lambda file: file.unlink(), "could be read at the start of the run"),
    (
      lambda file: file.write_bytes(file.read_bytes()[:-40]),
      "could be read at the start of the run",
    ),
    (lambda file: Image.new("L", (W, W), 9).save(file), "has changed since the start of the run"),
    (lambda file: Image.new("L", (W + 1, W)).save(file), "has changed since the start of the run"),
  ],
)
def test_a_file_that_changes_during_a_run_is_refused(tmp_path, spoil, why):
  write_folder(tmp_path)
  source = task(tmp_path, heldout=str(tmp_path)).open("train", None)
  spoil(tmp_path / "bag" / "1.png")
  source[4], source[6]
  with pytest.raises(InputError, match=f"bag/1.png {why}"):
    source[5]


def test_images_of_a_folder_are_not_held_in_memory(tmp_path):
  """Opening 200 images of 1 MB takes less than a tenth of their size."""
  for name in ("ankle", "bag"):
    (tmp_path / name).mkdir()
    Image.new("RGB", (600, 600)).save(tmp_path / name / "0.png")
    for i in range(1, 100):
      (tmp_path / name / f"{i}.png").hardlink_to(tmp_path / name / "0.png")
  opened = task(tmp_path, classes=(), size=600, channels=3, heldout=str(tmp_path))
  tracemalloc.start()
  source = opened.open("train", None)
  held = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert len(source) == 200 and held < 20e6


def text(folder):
  (folder / "bag" / "notes.txt").write_text("bags")


@pytest.mark.parametrize(
  "spoil, why, named, left",
  [
    (damaged, "is damaged", ("coat/9.png", "coat/cut.png"), 12),
    (unknown, "has class 'shoe'", ("shoe/0.png",), 12),
    (empty, "has no image", ("class 'bag'",), 8),
    (text, "neither PNG nor JPEG", ("bag/notes.txt",), 12),
  ],
)
def test_bad_files_stop_the_run_or_are_counted(tmp_path, capsys, spoil, why, named, left):
  write_folder(tmp_path)
  spoil(tmp_path)
  with pytest.raises(InputError, match=why):
    task(tmp_path).open("train", None)
  skipping = task(tmp_path, on_bad="skip", heldout=str(tmp_path))
  assert len(skipping.open("train", None)) == left
  printed = capsys.readouterr().err
  assert why in printed and all(name in printed for name in named)
  assert f"{len(named)} of {left + len(named)} examples skipped" in printed


def test_labels_out_of_range_stop_the_run_or_are_counted(tmp_path, capsys):
  write_idx(tmp_path, 6, labels=[0, 1, 2, 3, 9, 0])
  path = tmp_path / "train"
  with pytest.raises(InputError, match="image 3 of .* has label 3, but there are 3 classes"):
    task(path).open("train", None)
  source = task(path, on_bad="skip", heldout=str(path)).open("train", None)
  np.testing.assert_array_equal(all_of(source)[1], [0, 1, 2, 0])
  printed = capsys.readouterr().err
  assert "image 3" in printed and "image 4" in printed


def test_a_file_without_valid_labels_is_refused(tmp_path):
  write_idx(tmp_path, 4, labels=[3, 4, 5, 6])
  with pytest.raises(InputError, match="has no usable example: all 7 were skipped"):
    task(tmp_path / "train", on_bad="skip").open("train", None)


def cut_gzip(folder):
  file = folder / "train-images-idx3-ubyte.gz"
  file.write_bytes(file.read_bytes()[:-20])


def cut_array(folder):
  file = folder / "train-images-idx3-ubyte.gz"
  file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:-1]))


def of_labels(folder):
  idx(folder / "train-images-idx3-ubyte.gz", np.zeros(40))


def fewer(folder):
  idx(folder / "train-labels-idx1-ubyte.gz", np.zeros(39))


@pytest.mark.parametrize(
  "spoil, why",
  [
    (cut_gzip, "damaged"),
    (cut_array, "not a complete IDX file"),
    (of_labels, "not a complete IDX file of bytes with 3 axes"),
    (fewer, "40 images but 39 labels"),
  ],
)
def test_damaged_idx_files_are_refused_even_where_images_are_skipped(tmp_path, spoil, why):
  write_idx(tmp_path)
  spoil(tmp_path)
  with pytest.raises(InputError, match=why):
    task(tmp_path / "train", on_bad="skip").open("train", None)


def test_splits_depend_on_image_bytes_and_do_not_overlap(tmp_path):
  write_idx(tmp_path, 300)
  t = task(tmp_path / "train", heldout_fraction=0.3, labelled=0.25)
  of = lambda split, **changes: {
    x.tobytes() for x in all_of(dataclasses.replace(t, **changes).open(split, None))[0]
  }
  train, heldout = of("train"), of("heldout")
  known, unknown = of("train", which="labelled"), of("train", which="unlabelled")
  assert not train & heldout and len(train | heldout) == 300
  assert not known & unknown and known | unknown == train
  # Chances of 0.3 and 0.25, four deviations.
  assert abs(len(heldout) - 90) < 32 and abs(len(known) - len(train) / 4) < 26
  assert of("heldout", which="labelled") == heldout


def test_the_digest_depends_on_the_data(tmp_path):
  write_idx(tmp_path)
  made = task(tmp_path / "train")
  a = made.open("train", None).digest
  assert a == made.open("train", None).digest != made.open("heldout", None).digest
  write_idx(tmp_path, labels=np.zeros(40) + 1 - np.arange(40) % 2)
  with pytest.raises(InputError, match="class 'coat'"):
    made.open("train", None)
  assert dataclasses.replace(made, on_bad="skip").open("train", None).digest != a


@pytest.mark.parametrize(
  "changes, why",
  [
    ({"train": "/nowhere"}, "/nowhere is not a folder"),
    ({"train": "/nowhere", "classes": ()}, r"classes is \(\); expected the classes of /nowhere"),
    ({"on_bad": "shrug"}, "on_bad is 'shrug'; expected 'stop' or 'skip'"),
    ({"classes": ("one", "one")}, r"classes is \('one', 'one'\); expected two or more"),
    ({"channels": 2}, "channels is 2"),
    ({"size": W + 1}, "is not 13 x 13, but"),
    ({"heldout_fraction": 1e-9, "split": "heldout"}, "has no image of split 'heldout'"),
    ({"std": (0.0,)}, "std is .*; expected numbers above 0"),
    ({"mean": (0.5, 0.5)}, "mean is .*; expected one number, or one for each of"),
    ({"which": "some"}, "which is 'some'; expected one of all, "),
    ({"labelled": 0.0}, r"labelled is 0\.0; expected a fraction above 0"),
  ],
)
def test_invalid_configs_are_refused(tmp_path, changes, why):
  write_idx(tmp_path)
  split = changes.pop("split", "train")
  with pytest.raises(InputError, match=why):
    task(**{"folder": tmp_path / "train", **changes}).open(split, None)


def test_a_model_that_does_not_fit_is_refused(tmp_path):
  t = task(tmp_path)
  t.check(vit.TINY)
  with pytest.raises(
    InputError, match=r"image_classes\.size is 12; expected 8, the model's image size"
  ):
    t.check(dataclasses.replace(vit.TINY, image_size=8))
