"""The input of `retarget`: stores of records in the teacher's tokens, and both vocabularies."""

from __future__ import annotations

from distill_jax.config import Config
from distill_jax.cross_tokenizer import sides
from distill_jax.cross_tokenizer.sides import Side
from distill_jax.data import corpus
from distill_jax.errors import InputError, bad_value
from distill_jax.models import loading
from distill_jax.records import planned_stores
from distill_jax.records.store import Store, open_store
from distill_jax.runtime import files

KINDS = ("sampled", "text")


def open_stores(config: Config) -> dict[str, Store]:
  """Opens the stores of retarget.records, by their folders; "" is that folder itself.

  Raises:
    InputError: There is no store, or one is not finished or cannot be converted.
  """
  folder = config.retarget.records
  if not folder:
    expected = "the folder or URL of records in the teacher's tokens"
    raise bad_value("retarget.records", folder, expected, "Run `record` and name its folder")
  stores = {
    name: open_store(path) for name, path in planned_stores.found(folder, config.data).items()
  }
  names = [str(length) for length in config.data.buckets] or [""]
  for name in [n for n in names if n not in stores]:  # held-out rows may be finished before them
    at = files.join(folder, name) if name else folder
    raise InputError(f"{at} has no finished store of training rows. Run `record` again.")
  for store in stores.values():
    _check(store)
  return stores


def _check(store: Store) -> None:
  """Raises InputError if the records of a store cannot be converted."""
  m, key, folder = store.manifest, "retarget.records", str(store.folder)
  if m.labels:
    expected = "a store of text, not the labels of a task, which have no tokens"
    raise bad_value(key, folder, expected, "Train on it directly")
  if m.retargeted:
    expected = "a store in its teacher's own tokens, not one that was already converted"
    raise bad_value(key, folder, expected, "Name the store that `record` wrote")
  if m.kind not in KINDS:
    expected = f"a store of kind 'sampled', not {m.kind!r}, whose projection would be biased"
    raise bad_value(key, folder, expected, "Record with records.kind='sampled'")
  if m.temperature != 1:
    expected = f"a store of temperature 1, not {m.temperature:g}, because probabilities multiply"
    raise bad_value(key, folder, expected, "Record with records.temperature=1")
  if m.taps is not None:
    expected = "a store without taps, because features belong to the teacher's tokens"
    raise bad_value(key, folder, expected, "Record without records.taps")
  if m.smoothing:
    expected = "a store whose documents have no label smoothing of their own"
    raise bad_value(key, folder, expected, "Record without data.trust")


def holds_chats(config: Config) -> bool:
  """Returns True if the stores hold chats in the form of a chat template."""
  return config.data.kind == "chat" or config.retarget.chat


def teacher_side(config: Config, stores: dict[str, Store]) -> Side:
  """Returns the tokens of the teacher, which the stores hold.

  Raises:
    InputError: The stores were recorded with another tokenizer, or hold chats whose template is
      unknown.
  """
  pretrained = loading.open_source(config.teacher, config.seed).pretrained
  tokenizer = corpus.tokenizer_of(config.data, pretrained)
  for store in stores.values():
    if (found := store.manifest.tokenizer) != tokenizer.digest:
      raise InputError(
        f"{store.folder} was recorded with tokenizer {found[:12]}, but {tokenizer.where} is "
        f"{tokenizer.digest[:12]}. Set teacher.source, or data.tokenizer, to that of the records."
      )
  return sides.teacher_side(config.data, pretrained, tokenizer, holds_chats(config))


def student_side(config: Config) -> Side:
  """Returns the tokens of the student.

  Raises:
    InputError: The student has no tokenizer, its tokens have no bytes, or the stores hold chats and
      it has no chat template.
  """
  named = config.retarget.tokenizer
  pretrained = None if named else loading.open_source(config.student, config.seed).pretrained
  return sides.student_side("retarget.tokenizer", named, pretrained, holds_chats(config))
