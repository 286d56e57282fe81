"""The input of `retarget`: stores of records in the teacher's tokens, and both vocabularies."""

from __future__ import annotations

import json

from distill_jax.config import Config
from distill_jax.cross_tokenizer import roles
from distill_jax.cross_tokenizer.vocabulary import Vocabulary
from distill_jax.data import corpus, tokenizers
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError, bad_value
from distill_jax.hub.locate import locate
from distill_jax.models import loading
from distill_jax.records import planned_stores
from distill_jax.records.store import Store, open_store
from distill_jax.runtime import files

KINDS = ("sampled", "text")
WITHOUT_BYTES = ("WordPiece", "WordLevel")  # kinds of vocabularies whose tokens drop white space


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


def teacher_vocabulary(config: Config, stores: dict[str, Store]) -> Vocabulary:
  """Returns the vocabulary of the teacher, whose tokens the stores hold.

  Raises:
    InputError: The stores were recorded with another tokenizer.
  """
  pretrained = loading.open_source(config.teacher, config.seed).pretrained
  tokenizer = corpus.tokenizer_of(config.data, pretrained)
  for store in stores.values():
    if (found := store.manifest.tokenizer) != tokenizer.digest:
      raise InputError(
        f"{store.folder} was recorded with tokenizer {found[:12]}, but {tokenizer.where} is "
        f"{tokenizer.digest[:12]}. Set teacher.source, or data.tokenizer, to that of the records."
      )
  configs = [pretrained.generation] if pretrained else []
  if (found_files := corpus.files_of(config.data, pretrained)) is not None:
    configs.append(found_files.config)
  return _vocabulary(tokenizer, roles.stop_set(tokenizer, *configs))


def student_vocabulary(config: Config) -> Vocabulary:
  """Returns the vocabulary of the student.

  Raises:
    InputError: The student has no tokenizer, or its tokens have no bytes.
  """
  return _vocabulary(_student_tokenizer(config), ())


def _student_tokenizer(config: Config) -> Tokenizer:
  if named := config.retarget.tokenizer:
    folder, name = tokenizers.locate(locate(named))
    where = files.join(folder, name)
    return Tokenizer(files.read(where), where, None, None)  # as that of student.source
  pretrained = loading.open_source(config.student, config.seed).pretrained
  if pretrained is None or pretrained.tokenizer is None:
    expected = "the student's tokenizer, because student.source has none"
    raise bad_value("retarget.tokenizer", named, expected, "Name its file or folder")
  return corpus.of_files(pretrained.tokenizer, pretrained.source)


def _vocabulary(tokenizer: Tokenizer, stops: set[int] | tuple[()]) -> Vocabulary:
  """Returns the vocabulary of a tokenizer, if its tokens have bytes."""
  is_json = tokenizer.kind == "huggingface"
  model = json.loads(tokenizer.raw)["model"].get("type", "BPE") if is_json else "sentencepiece"
  vocabulary = Vocabulary(tokenizer, stops)
  if model in WITHOUT_BYTES or not vocabulary.id_of:
    raise InputError(
      f"{tokenizer.where} has tokens without bytes (its model is {model}), so texts cannot be "
      "aligned. Use a student with a byte-level BPE or a sentencepiece vocabulary."
    )
  return vocabulary
