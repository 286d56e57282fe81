"""Tests of image-text pairs: reading, errors, retrieval, and a run from record to export."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_image_text import configured
from tokenizers import Tokenizer

from distill_jax import config
from distill_jax.commands import evaluate, export
from distill_jax.data import image_files
from distill_jax.data.sources import DocumentSource
from distill_jax.errors import InputError
from distill_jax.evals import retrieval
from distill_jax.runtime.workdir import Workdir
from distill_jax.tasks import dataset
from distill_jax.tasks._jsonl_task import BadExamples, read_media
from distill_jax.training import loop, validate
from distill_jax.training import stores as training_stores


@pytest.fixture
def c(tmp_path):
  return configured(tmp_path)


def rows(c, split="train"):
  return dataset.open_examples(config.resolve(c), "pairs", split, None)


def test_an_example_holds_pixels_and_tokens(c):
  both = {s: rows(c, s) for s in ("train", "heldout")}
  assert len(both["train"]) + len(both["heldout"]) == 12
  tokenizer = Tokenizer.from_file(c.tasks.pairs.tokenizer)
  shades = []
  for row in (*both["train"], *both["heldout"]):
    ids = row["tokens_S"][row["valid_S"] > 0]
    assert tokenizer.decode(ids[-1:]) == "~"
    shade = int(tokenizer.decode(ids[:-1]).removeprefix("shade "))
    np.testing.assert_array_equal(row["pixels_WWM"], np.full((8, 8, 1), 20 * shade))
    shades.append(shade)
  assert sorted(shades) == list(range(12))
  c.tasks.pairs.max_tokens = 4
  ids = rows(c)[0]["tokens_S"]
  assert tokenizer.decode(ids) == "sha~"


def test_the_split_is_the_same_in_every_folder(c, tmp_path):
  """Names are hashed relative to the folder, so that a copy holds out the same pairs."""
  want = rows(c, "heldout").digest
  for name in ("b", "c", "d"):
    (tmp_path / name).mkdir()
    copy = configured(tmp_path / name)
    assert rows(copy, "heldout").digest == want


def test_a_folder_of_images_and_text_files_is_read(c, tmp_path):
  for i in range(12):
    (tmp_path / f"{i}.txt").write_text(f"shade {i}")
  (tmp_path / "11.txt").unlink()
  c.tasks.pairs.path = str(tmp_path)
  with pytest.raises(InputError, match="11.txt has no text"):
    rows(c)
  c.tasks.pairs.on_bad = "skip"
  assert len(rows(c)) + len(rows(c, "heldout")) == 11


@pytest.mark.parametrize(
  "line, why",
  [
    ({"image": "0.png", "text": " "}, "line 13 has no text"),
    ({"image": "broken.png", "text": "x"}, "broken.png is not a readable image"),
    ({"image": "nowhere.png", "text": "x"}, "nowhere.png is not a readable image"),
    ({"text": "x"}, "line 13 has no image in its field 'image'"),
  ],
)
def test_a_bad_pair_stops_the_run_or_is_counted(c, tmp_path, capsys, line, why):
  (tmp_path / "broken.png").write_bytes((tmp_path / "1.png").read_bytes()[:40])
  with (tmp_path / "pairs.jsonl").open("a") as f:
    f.write("\n" + json.dumps(line))
  c.tasks.pairs.heldout_fraction = 0.0
  with pytest.raises(InputError, match=why):
    rows(c)
  c.tasks.pairs.on_bad = "skip"
  assert len(rows(c)) == 12
  assert "1 of 13 examples skipped" in capsys.readouterr().err


def test_pixels_are_those_of_transformers(c, tmp_path):
  transformers = pytest.importorskip("transformers")
  torch = pytest.importorskip("torch")
  settings = rows(c).task.hub_files(None)["preprocessor_config.json"]
  settings.pop("image_processor_type")
  settings |= {"size": {"shortest_edge": 6}, "crop_size": {"height": 6, "width": 6}}
  settings |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "do_convert_rgb": True}
  pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3)).astype(np.uint8)
  Image.fromarray(pixels).save(tmp_path / "x.png")
  processor = transformers.CLIPImageProcessorPil(**settings)
  want = processor(Image.open(tmp_path / "x.png"), return_tensors="pt")["pixel_values"][0]
  got = image_files.decode((tmp_path / "x.png").read_bytes(), 6, 3)
  got = image_files.normalised(got, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
  # float32 in another order of operations, of numbers up to 4.
  assert torch.allclose(torch.tensor(got.transpose(2, 0, 1)), want, atol=2e-6)


def test_recall_is_computed_among_distinct_texts():
  unit = lambda *degrees: np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], -1)
  text, tokens = unit(0, 90, 90, 180), np.array([[1], [2], [2], [3]])
  # Image 1 is nearest to text 1; all others to their own. Text 3 is nearest to image 3.
  found = retrieval.recall(text, unit(10, 20, 80, 170), tokens)
  assert found == {"text_recall": 0.75, "image_recall": 1.0}
  found = retrieval.recall(text, unit(60, 5, 80, 170), tokens)
  assert found == {"text_recall": 0.5, "image_recall": pytest.approx(2 / 3)}


@pytest.mark.slow
def test_a_student_is_trained_with_an_online_teacher(c, tmp_path):
  """The exported folder loads in transformers as a model and an image processor."""
  transformers = pytest.importorskip("transformers")
  c.train.online = True
  c.export.dir, c.export.dtype = str(tmp_path / "hub"), "float32"
  c.losses.affinity = config.loss("kd")
  c.losses.features = config.loss("embedding", projection="orthogonal")
  resolved = config.resolve(c)
  with Workdir(tmp_path / "run", resolved) as folder:
    last = loop.train(resolved, folder)
  assert last["tokens"] == 8 and last["kl/teacher"] > 0 and 0 < last["features"] < 4
  row = evaluate.run(resolved, tmp_path)["models"]["start"]
  assert 0 <= row["text_recall"] <= 1 and row["ce"] > 0
  export.run(resolved, tmp_path / "run")
  _, loaded = transformers.CLIPModel.from_pretrained(tmp_path / "hub", output_loading_info=True)
  assert not any(loaded[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hub")
  assert tuple(processor.image_mean) == (0.5,) and processor.crop_size["height"] == 8


def test_what_does_not_fit_is_refused(c):
  def refused(match):
    with pytest.raises(InputError, match=match):
      resolved = config.resolve(c)
      stores = training_stores.open_stores(resolved)
      validate.check_run(resolved, stores)
      validate.check_features(resolved, loop.make_step(resolved, stores), stores)

  c.optim.accumulate = 2
  refused("optim.accumulate is 2; expected 1 for a contrastive task")
  c.optim.accumulate = 1
  c.losses.features = config.loss("embedding", projection="orthogonal")
  refused("needs a teacher's targets, but the records pairs only hold text or labels")
  del c.losses.features
  c.tasks.pairs.size = 9
  refused("image_text.size is 9; expected 8, the model's image size")
  c.tasks.pairs.size = 8
  c.student.changes.text.eos_token_id = 7
  refused("ends texts with token 93, but eos_token_id of the text tower is 7")
  c.student.family = "bert"
  c.student.changes = {}
  refused("image_text needs a model of images and texts.*of the family bert")


def test_images_at_a_url_are_refused():
  source = DocumentSource("jsonl", "gs://bucket/pairs.jsonl")
  with pytest.raises(InputError, match="path is 'gs://bucket/pairs.jsonl'; expected a local path"):
    next(read_media(source, "image", list, BadExamples("image_text_pairs", "stop")))
