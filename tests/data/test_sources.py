"""Document sources read all kinds of corpora and split them by content."""

import gzip
import hashlib
import json

import numpy as np
import pytest

from distill_jax.data import corpus, sources
from distill_jax.data.options import DataOptions
from distill_jax.data.sources import DocumentSource, documents
from distill_jax.errors import InputError

pytestmark = pytest.mark.smoke

TEXTS = [f"document {i}: é, 漢字\r\nand a second line " for i in range(200)]


@pytest.fixture
def folder(tmp_path):
  for i, text in enumerate(TEXTS):
    (tmp_path / f"{i:03}.txt").write_bytes(text.encode())
  (tmp_path / "notes.md").write_bytes(b"\xff not read")
  return tmp_path


@pytest.fixture
def jsonl(tmp_path):
  file = tmp_path / "corpus.jsonl"
  file.write_text("\n\n".join(json.dumps({"id": i, "text": t}) for i, t in enumerate(TEXTS)))
  return file


def test_text_is_not_normalised(folder):
  assert list(documents(DocumentSource("text", str(folder), heldout_fraction=0))) == TEXTS
  one = DocumentSource("text", str(folder / "007.txt"), heldout_fraction=0)
  assert list(documents(one)) == [TEXTS[7]]


def test_jsonl_equals_text(folder, jsonl):
  for split in ("train", "heldout"):
    ours = list(documents(DocumentSource("jsonl", str(jsonl), split)))
    assert ours == list(documents(DocumentSource("text", str(folder), split)))


def test_blocks_of_a_compressed_file_are_those_of_the_file(jsonl, monkeypatch):
  """Reading can begin at each block, as after a stop."""
  monkeypatch.setattr(sources, "BLOCK_BYTES", 1000)
  packed = jsonl.with_suffix(".jsonl.gz")
  packed.write_bytes(gzip.compress(jsonl.read_bytes()))
  plain, ours = (DocumentSource("jsonl", str(file)) for file in (jsonl, packed))
  want = [(b.place, b.content) for b in sources.blocks(plain)]
  assert [(b.place, b.content) for b in sources.blocks(ours)] == want and len(want) > 5
  later = next(sources.blocks(ours, want[3][0]))
  assert (later.place, later.content) == want[3]
  assert list(documents(ours)) == list(documents(plain))


def test_splits_are_a_partition_by_content(jsonl):
  train, heldout = (
    list(documents(DocumentSource("jsonl", str(jsonl), s))) for s in ("train", "heldout")
  )
  assert sorted(train + heldout) == sorted(TEXTS)
  assert 5 <= len(heldout) <= 40  # binomial(200, 0.1): four deviations and more each way
  # A document's split does not depend on the others, and equal documents have the same split.
  lines = [json.dumps({"text": t}) for t in (heldout[0], train[0], heldout[0])]
  jsonl.write_text("\n".join(lines))
  assert list(documents(DocumentSource("jsonl", str(jsonl), "heldout"))) == [heldout[0]] * 2
  assert list(documents(DocumentSource("jsonl", str(jsonl), "train"))) == [train[0]]


def test_pydoc_splits_by_topic():
  from pydoc_data.topics import topics

  train, heldout = (list(documents(DocumentSource("pydoc", split=s))) for s in ("train", "heldout"))
  side = {k: int(hashlib.sha256(k.encode()).hexdigest()[:16], 16) / 16**16 for k in topics}
  assert heldout == [topics[k] for k in sorted(topics) if side[k] < 0.1]
  assert 2 <= len(heldout) <= 0.25 * len(topics)
  assert len(heldout) + len(train) == len(topics)
  # Nothing is added, and little is removed.
  whole = sum(len(topics[k]) for k in topics if side[k] >= 0.1)
  assert 0.8 * whole < sum(map(len, train)) <= whole
  assert len(list(documents(DocumentSource("pydoc", heldout_fraction=0)))) == len(topics)


def test_pydoc_training_text_holds_no_heldout_text():
  """Python's reference repeats whole topics inside others, so a naive split would leak lines."""

  def long_lines(texts):
    return [s for text in texts for line in text.split("\n") if len(s := line.strip()) > 60]

  from pydoc_data.topics import topics

  heldout = list(documents(DocumentSource("pydoc", split="heldout")))
  train = set(long_lines(documents(DocumentSource("pydoc"))))
  assert sum(line in train for line in long_lines(heldout)) <= 0.01 * len(long_lines(heldout))
  naive = set(long_lines(t for t in topics.values() if t not in heldout))
  assert sum(line in naive for line in long_lines(heldout)) > 0.3 * len(long_lines(heldout))


def test_streams_files(tmp_path):
  (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\nnot json\n')
  stream = documents(DocumentSource("jsonl", str(tmp_path), heldout_fraction=0))
  assert next(stream) == "fine"
  with pytest.raises(InputError, match=r"a\.jsonl, line 2 is not JSON"):
    next(stream)


@pytest.mark.parametrize(
  "raw, message",
  [
    (b'{"text": "a"}\n{"text": "\xff"}\n', "Byte 24 is 0xff, which is not UTF-8"),
    (b'{"text": "a"}\n{"text": "b"', "line 2 is not JSON"),
    (b'{"text": "a"}\n["b"]\n', "line 2 is a JSON list"),
    (
      b'{"body": "a", "id": 1}\n',
      r"line 1 has no field 'text' \(it has 'body', 'id'\). Set data.field",
    ),
    (  # with the time 0: workers of pytest-xdist must find the same name of the test
      gzip.compress(b'{"text": "a"}\n', mtime=0),
      r"x\.jsonl: The file is compressed with gzip. Unpack it",
    ),
    (b'{"text": 3}\n', "field 'text' has the type int"),
    (b'{"text": "\\ud800"}\n', "half a surrogate pair"),
    (b"\xef\xbb\xbf{}", "line 1 is not JSON"),
    (b"", "has no document with text"),
    (b'{"text": " "}\n\n', "has no document with text"),
  ],
)
def test_invalid_jsonl_files_are_errors(tmp_path, raw, message):
  (file := tmp_path / "x.jsonl").write_bytes(raw)
  with pytest.raises(InputError, match=message):
    list(documents(DocumentSource("jsonl", str(file), heldout_fraction=0)))


def test_invalid_text_files_are_errors(tmp_path):
  with pytest.raises(InputError, match="does not exist"):
    list(documents(DocumentSource("text", str(tmp_path / "gone.txt"))))
  with pytest.raises(InputError, match=r"without \.txt files"):
    list(documents(DocumentSource("text", str(tmp_path))))
  (tmp_path / "a.txt").write_bytes("é".encode("latin-1") * 3)
  with pytest.raises(InputError, match=r"a\.txt: Byte 0 is 0xe9, which is not UTF-8"):
    list(documents(DocumentSource("text", str(tmp_path))))
  (tmp_path / "a.txt").write_text("one document cannot be on both sides")
  sides = []
  for split in ("train", "heldout"):
    try:
      sides.append(len(list(documents(DocumentSource("text", str(tmp_path), split)))))
    except InputError as e:
      assert f"has 1 documents, but the split {split!r} has none" in str(e)
  assert sides == [1]


@pytest.mark.parametrize(
  "source, message",
  [
    ({"kind": "csv"}, "kind is 'csv'; expected one of"),
    ({"kind": "text"}, "path is ''; expected a file or folder"),
    ({"kind": "text", "path": "a", "split": "test"}, "split is 'test'"),
    ({"kind": "text", "path": "a", "heldout_fraction": 1}, "heldout_fraction is 1"),
    ({"kind": "pydoc", "split": "heldout", "heldout_fraction": 0}, "heldout_fraction is 0; expec"),
  ],
)
def test_invalid_arguments_are_errors(source, message):
  with pytest.raises(InputError, match=message):
    DocumentSource(**source)


def test_errors_name_the_config_key():
  with pytest.raises(InputError, match=r"^data\.kind is 'csv'; expected one of"):
    corpus.source_of(DataOptions(kind="csv"))


def test_tfds(tmp_path):
  import tensorflow_datasets as tfds

  class OwnText(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      features = {"body": tfds.features.Text(), "n": np.int32}
      return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
      )

    def _split_generators(self, _):
      return {"train": self._generate_examples(40), "test": self._generate_examples(2)}

    def _generate_examples(self, n):
      yield from ((i, {"body": TEXTS[i], "n": i}) for i in range(n))

  OwnText(data_dir=tmp_path, file_format="array_record").download_and_prepare()
  for path in ("own_text", "own_text:1.0.0", "own_text/1.0.0"):
    source = DocumentSource("tfds", str(tmp_path / path), "train[:75%]", "body")
    assert list(documents(source)) == TEXTS[:30]
  assert (
    list(documents(DocumentSource("tfds", str(tmp_path / "own_text"), "test", "body"))) == TEXTS[:2]
  )
  assert "tensorflow" not in __import__("sys").modules
  for source, message in [
    (
      DocumentSource("tfds", str(tmp_path / "own_text"), "heldout", "body"),
      "Unknown split 'heldout'",
    ),
    (DocumentSource("tfds", str(tmp_path / "own_text/1.0.0"), "heldout", "body"), "Unknown split"),
    (
      DocumentSource("tfds", str(tmp_path / "no_such_text"), "train", "body"),
      "no_such_text not found",
    ),
    (DocumentSource("tfds", str(tmp_path / "own_text"), "train"), "no field 'text'.*'body'"),
    (
      DocumentSource("tfds", str(tmp_path / "own_text"), "train", "n"),
      "field 'n' has the type int",
    ),
  ]:
    with pytest.raises(InputError, match=message):
      list(documents(source))


def test_every_kind_is_documented():
  assert all(f'"{kind}"' in DocumentSource.__doc__ for kind in sources.KINDS)
