"""What tests of tasks of encoder-decoders share: a tokenizer, and a run of two steps."""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from distill_jax import config
from distill_jax.commands import record
from distill_jax.runtime.workdir import Workdir
from distill_jax.training import loop

PAD, EOS, V = 256, 257, 258
IDS = {"vocab_size": V, "pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD}


def write_tokenizer(path):
  """A byte each, and T5's two special tokens."""
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  tokenizer = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(["<pad>", "</s>"])
  tokenizer.save(str(path))
  return str(path)


def two_steps(folder, family, **changes):
  """A config in which a tiny student learns two steps from a tiny teacher's records."""
  c = config.base()
  for model in (c.teacher, c.student):  # random both, by keys of their own
    model.family, model.shape = family, "tiny"
    model.changes = {**IDS, **changes}
  c.train.records = (str(folder / "records"),)
  c.train.steps, c.train.batch_size, c.train.checkpoint_every = 2, 4, 2
  c.evaluate.batch_size = 4
  return c


def record_and_train(c, folder):
  """(the resolved config, the student's last metrics)."""
  resolved = config.resolve(c)
  with Workdir(folder / "records", resolved) as records:
    record.run(resolved, records)
  with Workdir(folder / "student", resolved) as student:
    return resolved, loop.train(resolved, student)
