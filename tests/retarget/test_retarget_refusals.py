"""Stores and tokenizers that `retarget` cannot use: one sentence each, and nothing is written."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import retarget_runs
import tokenizers
from retarget_runs import END, made, records, run, write_store
from tokenizers import models, normalizers

from distill_jax.cross_tokenizer import student_lengths
from distill_jax.errors import InputError
from distill_jax.records import manifest as manifest_lib
from distill_jax.records.store import Taps


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  return retarget_runs.write_source(tmp_path_factory.mktemp("source"))


def refused(c, folder, match):
  """Runs a config that raises, and returns the message."""
  with pytest.raises(InputError, match=match) as error:
    run(c, folder)
  assert not list(folder.rglob("*.array_record"))
  return str(error.value)


RETARGETED = {"tokenizer": "x", "store": "y", "method": "samples", "min_mass": 0.1}


@pytest.mark.parametrize(
  "change, match",
  [
    (
      {"kind": "topk", "missing_mass": "tail_bucket"},
      "of kind 'sampled', not 'topk'.*Record with records.kind='sampled'",
    ),
    ({"temperature": 2.0}, "of temperature 1, not 2.*Record with records.temperature=1"),
    ({"taps": Taps((1,), 4)}, "without taps.*Record without records.taps"),
    ({"smoothing": True}, "no label smoothing of their own. Record without data.trust"),
    ({"labels": True, "format_version": 2}, "not the labels of a task"),
    ({"retargeted": RETARGETED}, "not one that was already converted. Name the store"),
    ({"tokenizer": "f" * 64}, r"was recorded with tokenizer ffff.*Set teacher.source, or data"),
  ],
)
def test_a_store_that_cannot_be_converted(source, tmp_path, change, match):
  """The manifest decides, before a record is read."""
  shutil.copytree(source / "records", tmp_path / "records")
  shutil.rmtree(tmp_path / "records" / "heldout")
  m = manifest_lib.load(tmp_path / "records")
  dataclasses.replace(m, **change).save(tmp_path / "records")
  c = made(source, records=str(tmp_path / "records"))
  assert refused(c, tmp_path / "out", match).count(". ") == 1


@pytest.mark.parametrize(
  "options, match",
  [
    ({"records": ""}, "retarget.records is ''; expected the folder or URL"),
    ({"records": "nowhere"}, "nowhere is empty or does not exist"),
    ({"tokenizer": ""}, "retarget.tokenizer is ''; expected the student's tokenizer, because"),
    ({"tokenizer": "nowhere"}, "nowhere does not exist"),
    ({"slice": "2/2"}, "retarget.slice is '2/2'; expected INDEX/COUNT"),
    ({"seq_len": -1}, "retarget.seq_len is -1; expected at least 0"),
    ({"workers": -1}, "retarget.workers is -1; expected at least 0"),
    ({"min_mass": 1.5}, "retarget.min_mass is 1.5; expected a number from 0 to 1"),
    ({"roles": {END: "<none>"}}, "retarget.roles"),
  ],
)
def test_options_that_cannot_be_used(source, tmp_path, options, match):
  refused(made(source, **options), tmp_path / "out", match)


def test_a_vocabulary_without_bytes(source, tmp_path):
  words = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
  words.save(str(tmp_path / "words.json"))
  c = made(source, tokenizer=str(tmp_path / "words.json"))
  refused(c, tmp_path / "out", "has tokens without bytes .its model is WordPiece.")


def normalized(source, folder, old, new):
  """Returns the config with a student's tokenizer that replaces some text."""
  other = tokenizers.Tokenizer.from_file(str(source / "student.json"))
  other.normalizer = normalizers.Replace(old, new)
  other.save(str(folder / "other.json"))
  return made(source, tokenizer=str(folder / "other.json"))


def test_a_tokenizer_that_changes_every_text(source, tmp_path):
  c = normalized(source, tmp_path, "times", "x")
  refused(c, tmp_path / "out", "spells none of the 40 texts of a sample")


def test_texts_that_the_tokenizer_changes_are_skipped_and_counted(source, tmp_path):
  found = run(normalized(source, tmp_path, "14 times", "x"), tmp_path / "out")
  assert found["skipped.not spelt back"] == 1


def test_a_student_without_an_end_of_text(source, tmp_path):
  tokenizer = json.loads((source / "student.json").read_text())
  tokenizer["added_tokens"] = []
  tokenizer["model"]["vocab"].pop(END)
  (tmp_path / "other.json").write_text(json.dumps(tokenizer))
  c = made(source, tokenizer=str(tmp_path / "other.json"))
  refused(c, tmp_path / "out", "has no token that ends a text.*retarget.roles")


def test_a_flipped_byte_and_a_missing_shard(source, tmp_path):
  shutil.copytree(source / "records", tmp_path / "records")
  c = made(source, records=str(tmp_path / "records"))
  shard = tmp_path / "records" / manifest_lib.shard_name(1)
  data = bytearray(shard.read_bytes())
  data[data.index(b"tokens") + 20] ^= 1
  shard.write_bytes(data)
  refused(c, tmp_path / "out", r"records-00001.array_record is damaged at record 6")
  shard.unlink()
  refused(c, tmp_path / "out", r"records-00001.array_record is missing. Run `record` again.")


def test_an_unfinished_store_beside_finished_heldout_rows(source, tmp_path):
  shutil.copytree(source / "records", tmp_path / "records")
  (tmp_path / "records" / "manifest.json").unlink()
  c = made(source, records=str(tmp_path / "records"))
  refused(c, tmp_path / "out", "records has no finished store of training rows. Run")
  refused(made(source, seq_len=1), tmp_path / "out", "retarget.seq_len is 1; expected rows of 2")


def test_lengths_have_the_ratios_of_the_stores(source, tmp_path, monkeypatch):
  """So held-out rows have a length that is trained on, though they have more tokens."""
  monkeypatch.setattr(student_lengths, "MULTIPLE", 1)
  teacher, folder = source / "teacher.json", tmp_path / "records"
  rows = records(teacher, 0, 6)
  pad = lambda x: np.pad(x, [(0, x.shape[0])] + [(0, 0)] * (x.ndim - 1))
  for name, of_name in (("32", rows), ("heldout/32", records(teacher, 20, 4))):
    write_store(folder / name, teacher, of_name)
  longer = [{name: pad(array) for name, array in row.items()} for row in rows]
  write_store(folder / "64", teacher, longer, seq_len=64)
  c = made(source, records=str(folder))
  c.data.buckets, c.data.seq_len = (32, 64), 64
  found = run(c, tmp_path / "out")
  lengths = {n: manifest_lib.load(tmp_path / "out" / n).seq_len for n in ("32", "heldout/32", "64")}
  assert lengths["32"] == lengths["heldout/32"] == lengths["64"] / 2
  assert not any(count for name, count in found.items() if name.endswith("cut_tokens"))
  c.retarget.seq_len = lengths["64"] - 2
  cut = run(c, tmp_path / "shorter")
  assert cut["heldout/32/cut_tokens"] > 0 and not cut["64/cut_tokens"]
  c.retarget.seq_len = 63
  refused(c, tmp_path / "odd", "retarget.seq_len is 63; expected a multiple of 2, because")


def test_rows_that_do_not_fit_are_cut_and_counted(source, tmp_path):
  found = run(made(source, seq_len=24), tmp_path / "out")
  assert found["cut_tokens"] > 0 and found["cut_targets"] > 0
  assert found["tokens"] <= 24 * found["rows"]


def test_another_source_or_student_is_refused_in_the_same_folder(source, tmp_path):
  run(made(source), tmp_path / "out")
  teacher = source / "teacher.json"
  other = write_store(tmp_path / "other", teacher, records(teacher, 1, retarget_runs.ROWS))
  with pytest.raises(InputError, match=r"holds records with retargeted.store="):
    run(made(source, records=str(other)), tmp_path / "out")
  with pytest.raises(InputError, match="holds records with "):
    run(made(source, tokenizer=str(teacher)), tmp_path / "out")
