"""Image-text pairs of a few pixels, and a config that trains on them with an online teacher."""

import tiny
import tiny_images
from tokenizers import Tokenizer, processors

from distill_jax import config

TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
TOWER |= {"num_attention_heads": 2}
TEXT = {**TOWER, "vocab_size": 256, "max_position_embeddings": 16}
TEXT |= {"bos_token_id": 0, "eos_token_id": 93}  # "~" of the bytes that tiny's tokenizer has
VISION = {**TOWER, "image_size": 8, "patch_size": 4, "num_channels": 1}


def write_tokenizer(path):
  """Writes a tokenizer with one token per byte and an end token."""
  made = Tokenizer.from_file(str(tiny.write_tokenizer(path)))
  made.post_processor = processors.TemplateProcessing("$A ~", None, [("~", made.token_to_id("~"))])
  made.save(str(path))
  return str(path)


def configured(folder):
  """Writes twelve grey squares, whose texts name the shade; returns the config of two towers."""
  c = config.base()
  for model in (c.teacher, c.student):
    model.family, model.shape = "clip", "tiny"
    model.changes = {"text": TEXT, "vision": VISION, "projection_dim": 8}
  c.teacher.changes.projection_dim = 12
  c.tasks.pairs = config.task(
    "image_text",
    path=tiny_images.write_shades(folder, 12, 20),
    heldout_fraction=0.4,
    size=8,
    channels=1,
    mean=(0.5,),
    std=(0.25,),
    max_tokens=16,
    tokenizer=write_tokenizer(folder / "t.json"),
  )
  c.losses.hard = config.loss("ce")
  c.train.steps, c.train.batch_size, c.evaluate.batch_size = 2, 4, 4
  return c
