"""A whole run in seconds: a random teacher, a byte tokenizer, a page of text."""

from pathlib import Path

import ml_collections
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from distill_jax import config, registry
from distill_jax.models import _decoder
from distill_jax.training.metric_writer import read_metrics
from distill_jax.training.run_log import CLOCK

SEQ_LEN = 32


def decoder_families() -> list[str]:
  """The families that go on from a text; the others read images, sounds, or whole texts."""
  is_decoder = lambda n: issubclass(registry.load("models", n).Config, _decoder.Config)
  return [name for name in registry.names("models") if is_decoder(name)]


def decoder_shapes() -> list[tuple[str, str]]:
  """(family, shape) of every tiny decoder."""
  return [
    (name, shape)
    for name in decoder_families()
    for shape in registry.load("models", name).CONFIGS
    if shape.startswith("tiny")
  ]


def write_tokenizer(path: Path) -> Path:
  """A tokenizer.json with one token a byte: 256 of them, as llama.TINY has rows."""
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  tokenizer = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.save(str(path))
  return path


def sentences(count: int = 120) -> list[str]:
  """Sentences that differ, so that no two sequences are alike."""
  return [f"{i} times {i + 3} is {i * (i + 3)}, as anyone can see." for i in range(count)]


def write_text(path: Path, lines: int = 120) -> Path:
  path.write_text("\n".join(sentences(lines)), encoding="utf-8")
  return path


def tiny(folder: Path) -> ml_collections.ConfigDict:
  """A config of everything, its files under `folder`."""
  c = config.base()
  c.teacher.shape = c.student.shape = "tiny"
  c.teacher.source = f"run:{folder / 'teacher'}"
  c.data.kind = "text"
  c.data.path = str(write_text(folder / "text.txt"))
  c.data.tokenizer = str(write_tokenizer(folder / "tokenizer.json"))
  c.data.heldout_fraction = 0.0
  c.data.seq_len = SEQ_LEN
  c.data.sequences = 20
  c.records.n = 15
  c.records.batch_size = 4
  c.records.tokens_per_shard = 6 * SEQ_LEN
  c.records.chunk = 16
  c.losses.soft = config.loss("kd", weight=0.7)
  c.losses.hard = config.loss("ce", weight=0.3)
  c.optim.peak_lr = 1e-2
  c.train.records = (str(folder / "records"),)
  c.train.steps = 6
  c.train.batch_size = 4
  c.train.chunk = c.evaluate.chunk = 16
  c.train.checkpoint_every = 2
  c.evaluate.examples = 0  # they compile the decoding of every model
  return c


def write_config(path: Path, folder: Path, *changes: str) -> Path:
  """Writes the config of `tiny(folder)` as a file, for commands in other processes.

  Args:
    path: The config file.
    folder: The folder of the files that the config names.
    *changes: Lines of Python that change the config `c`.
  """
  lines = [
    "import pathlib, sys",
    f"sys.path.insert(0, {str(Path(__file__).parent)!r})",
    "import tiny",
    "def get_config():",
    f"  c = tiny.tiny(pathlib.Path({str(folder)!r}))",
    *(f"  {change}" for change in changes),
    "  return c",
  ]
  path.write_text("\n".join(lines) + "\n", encoding="utf-8")
  return path


def measured(workdir: Path) -> list[dict[str, float]]:
  """A run's rows without the wall clock, which no two runs share."""
  return [{k: v for k, v in row.items() if k not in CLOCK} for row in read_metrics(workdir)]
