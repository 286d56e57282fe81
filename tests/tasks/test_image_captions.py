"""Tests of image captioning: a decoder that reads images is trained from records of another."""

import dataclasses
import json

import numpy as np
import pytest
import tiny
import tiny_images
from tokenizers import Tokenizer

from distill_jax import config
from distill_jax.commands import record
from distill_jax.errors import InputError
from distill_jax.models import llava
from distill_jax.runtime.workdir import Workdir
from distill_jax.tasks import dataset
from distill_jax.training import loop
from distill_jax.training import stores as training_stores

PATCHES, IMAGE = llava.TINY.vision.num_patches, llava.TINY.image_token


@pytest.fixture
def c(tmp_path):
  tokens = tiny.write_tokenizer(tmp_path / "tokenizer.json")
  end = {"eos_token": "~"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(end))
  c = config.base()
  c.teacher.family = c.student.family = "llava"
  c.teacher.shape = c.student.shape = "tiny"
  c.tasks.captions = config.task(
    "image_captions",
    path=tiny_images.write_shades(tmp_path, 6, 40),
    heldout_fraction=0.0,
    size=8,
    channels=1,
    mean=(0.5,),
    std=(0.25,),
    tokenizer=str(tokens),
    prompt="a <image> b",
    patches=PATCHES,
    image_token=IMAGE,
    max_tokens=24,
    vocab_size=256,
  )
  c.records.n, c.records.batch_size = 15, 4
  c.losses.soft = config.loss("kd")
  c.train.records = (str(tmp_path / "records"),)
  c.train.steps, c.train.batch_size = 2, 4
  return c


def test_a_row_holds_the_prompt_the_patches_and_the_text(c):
  row = dataset.open_examples(config.resolve(c), "captions", "train", None)[3]
  tokenizer = Tokenizer.from_file(c.tasks.captions.tokenizer)
  read, labels = row["tokens_S"], row["labels_T"]
  assert tokenizer.decode(read[:2]) == "a " and np.all(read[2 : 2 + PATCHES] == IMAGE)
  assert tokenizer.decode(labels[row["mask_T"]]) == "shade 3~"
  n = row["valid_S"].sum()
  np.testing.assert_array_equal(labels[: n - 1], read[1:n])
  first = np.flatnonzero(row["mask_T"])[0]  # the position that predicts the first token of the text
  assert tokenizer.decode(read[first - 1 : first + 1]) == " b"


@pytest.mark.slow
def test_a_student_is_trained_from_records(c, tmp_path):
  c.student.train, c.student.frozen = "frozen", ("vision_tower.",)
  resolved = config.resolve(c)
  with Workdir(tmp_path / "records", resolved) as folder:
    record.run(resolved, folder)
  with Workdir(tmp_path / "run", resolved) as folder:
    last = loop.train(resolved, folder)
  assert last["tokens"] == 4 * len("shade 0~")
  assert 0 < last["kl/teacher"] < 1  # both are random; log 256 is 5.5


def test_what_does_not_fit_is_refused(c):
  def refused(match):
    with pytest.raises(InputError, match=match):
      training_stores.open_stores(dataclasses.replace(config.resolve(c)))

  c.train.records = ()
  c.tasks.captions.image_token = 7
  refused("image_captions.image_token is 7; expected")
  c.tasks.captions.image_token = IMAGE
  c.tasks.captions.max_tokens = 8
  refused("max_tokens is 8; expected more than the 8 tokens of the prompt and image")
  c.tasks.captions.prompt = "what is it?"
  refused("prompt is 'what is it\\?'; expected a text with <image> once")
