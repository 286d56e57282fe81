"""Data is recognised by looking at it, prepared where necessary, and refused in one sentence."""

import dataclasses
import gzip
import json

import pytest
import tiny
from json_lines import write_lines

from distill_jax.data import sources
from distill_jax.errors import InputError
from distill_jax.recipe import beginning, data_source
from distill_jax.runtime import files

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def documents(data, split):
  source = sources.DocumentSource(
    data.kind, data.path, split=split, field=data.field, heldout_fraction=data.heldout_fraction
  )
  return list(sources.documents(source))


def prepared(path, folder):
  found = data_source.find(str(path))
  data = data_source.prepare(found, folder)
  train, heldout = documents(data, "train"), documents(data, "heldout")
  assert train and heldout
  assert not set(train) & set(heldout)
  return found, data, [*train, *heldout]


def test_a_text_file_is_cut_into_parts(tmp_path):
  lines = tiny.sentences(400)
  path = tmp_path / "notes.txt"
  path.write_text("\n".join(lines))
  found, data, texts = prepared(path, tmp_path / "data")
  assert "notes.txt is a text file, cut into parts" in found.sentence
  assert data.kind == "jsonl"
  assert sorted("\n".join(texts).splitlines()) == sorted(lines)
  assert all(len(text) < 2 * data_source.MIN_PART for text in texts)


@pytest.mark.parametrize("text", ["word " * 2000, "a line\n" * 1000, "a paragraph\n\n" * 700])
def test_parts_are_cut_where_the_text_has_a_place(text):
  parts = list(data_source.parts(text, 600))
  assert len(parts) > 5
  assert all(600 <= len(part) < 700 for part in parts[:-1])


def test_a_folder_of_many_text_files_is_read_directly(tmp_path):
  for i, line in enumerate(tiny.sentences(30)):
    (tmp_path / f"{i}.txt").write_text(line)
  found, data, texts = prepared(tmp_path, tmp_path / "data")
  assert "holds 30 text files, each a document" in found.sentence
  assert (data.kind, data.path) == ("text", str(tmp_path))
  assert sorted(texts) == sorted(tiny.sentences(30))


def test_a_folder_with_folders_and_other_suffixes_is_joined(tmp_path):
  (tmp_path / "notes" / "deep").mkdir(parents=True)
  for i, line in enumerate(tiny.sentences(30)):
    (tmp_path / "notes" / ("deep" if i % 2 else "") / f"{i}.md").write_text(line)
  (tmp_path / "notes" / ".hidden.txt").write_text("not read")
  _, data, texts = prepared(tmp_path / "notes", tmp_path / "data")
  assert data.path == str(tmp_path / "data" / "documents.jsonl")
  assert sorted(texts) == sorted(tiny.sentences(30))


def test_json_lines_of_texts(tmp_path):
  rows = [{"id": i, "text": line} for i, line in enumerate(tiny.sentences(40))]
  path = write_lines(tmp_path / "a.jsonl", rows)
  found, data, _ = prepared(path, tmp_path / "data")
  assert (data.kind, data.path, data.field) == ("jsonl", str(path), "text")
  assert "'text'" in found.sentence


def test_the_only_field_with_text_is_taken(tmp_path):
  rows = [{"id": i, "body": line} for i, line in enumerate(tiny.sentences(40))]
  _, data, _ = prepared(write_lines(tmp_path / "a.jsonl", rows), tmp_path / "data")
  assert data.field == "body"


def test_chats(tmp_path):
  rows = [{"messages": [*CHAT, {"role": "user", "content": str(i)}]} for i in range(30)]
  path = write_lines(tmp_path / "chats.jsonl", rows)
  found, data, _ = prepared(path, tmp_path / "data")
  assert (data.kind, data.path, data.on_bad) == ("chat", str(path), "skip")
  assert "chats" in found.sentence


@pytest.mark.parametrize("prompt, completion", [("prompt", "completion"), ("question", "answer")])
def test_prompts_with_completions_become_chats(tmp_path, prompt, completion):
  rows = [{prompt: f"{i} + 1?", completion: str(i + 1)} for i in range(30)]
  path = write_lines(tmp_path / "pairs.jsonl", rows)
  _, data, lines = prepared(path, tmp_path / "data")
  assert data.kind == "chat"
  chats = sorted((json.loads(line) for line in lines), key=lambda row: int(row["text"]))
  assert chats[3] == {"prompt": "3 + 1?", "text": "4"}


def test_an_instruction_may_have_an_input(tmp_path):
  rows = [{"instruction": "Add", "input": f"{i} and 1", "output": str(i + 1)} for i in range(30)]
  path = write_lines(tmp_path / "pairs.jsonl", rows)
  _, _, lines = prepared(path, tmp_path / "data")
  assert any(json.loads(line)["prompt"] == "Add\n\n7 and 1" for line in lines)


def test_pythons_own_text():
  data = data_source.prepare(data_source.find("pydoc"), None)
  assert (data.kind, data.path) == ("pydoc", "")


def refused(path):
  with pytest.raises(InputError) as error:
    data_source.prepare(data_source.find(str(path)), path.parent / "prepared")
  assert "\n" not in str(error.value)
  return str(error.value)


def test_what_cannot_be_used_is_refused(tmp_path):
  assert "Check the path" in refused(tmp_path / "nowhere.txt")
  (tmp_path / "empty.txt").write_text("")
  assert "empty.txt, which is empty; expected a text file" in refused(tmp_path / "empty.txt")
  (tmp_path / "lines.jsonl").write_text("\n")
  assert "lines.jsonl, which is empty" in refused(tmp_path / "lines.jsonl")
  (tmp_path / "latin.txt").write_bytes("grün".encode("latin-1"))
  assert "latin.txt: Byte 2 is 0xfc, which is not UTF-8. Convert" in refused(tmp_path / "latin.txt")
  (tmp_path / "photo.png").write_bytes(b"\x89PNG\0\0")
  assert "photo.png, which is not text" in refused(tmp_path / "photo.png")
  (tmp_path / "list.json").write_text('[{"text": "a"},\n{"text": "b"}]')
  assert "one JSON value" in refused(tmp_path / "list.json")
  (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
  assert "broken.jsonl, line 2" in refused(tmp_path / "broken.jsonl")
  (tmp_path / "short.txt").write_text("One line.")
  assert "too few to hold one out" in refused(tmp_path / "short.txt")
  (tmp_path / "folder").mkdir()
  (tmp_path / "folder" / "a.parquet").write_bytes(b"PAR1")
  assert "with 1 files; expected" in refused(tmp_path / "folder")
  rows = [{"title": "a", "body": "b"}] * 3
  error = refused(write_lines(tmp_path / "two.jsonl", rows))
  assert "whose fields are 'title', 'body'; expected a field 'text'" in error


def test_the_held_out_part_is_a_tenth_of_little_and_less_of_much(tmp_path):
  few = write_lines(tmp_path / "few.jsonl", [{"text": str(i)} for i in range(40)])
  many = write_lines(tmp_path / "many.jsonl", [{"text": str(i)} for i in range(20_000)])
  assert prepared(few, tmp_path)[1].heldout_fraction == 0.1
  assert prepared(many, tmp_path)[1].heldout_fraction == 0.005


def test_data_at_a_url_is_recognised_and_read(tmp_path):
  """A folder of a URL holds what is directly in it; a small file is prepared in the workdir."""
  lines = [json.dumps({"body": text}) for text in tiny.sentences(60)]
  files.write("memory://recipe/corpus/a.jsonl", "\n".join(lines[:30]).encode())
  files.write("memory://recipe/corpus/b.jsonl", "\n".join(lines[30:]).encode())
  files.write("memory://recipe/corpus/deep/c.jsonl", b"not read")
  files.write("memory://recipe/notes.txt", "\n".join(tiny.sentences(200)).encode())
  found, data, texts = prepared("memory://recipe/corpus", tmp_path / "data")
  assert (data.kind, data.path, data.field) == ("jsonl", "memory://recipe/corpus", "body")
  assert sorted(texts) == sorted(tiny.sentences(60)) and not found.convert
  found, data, texts = prepared("memory://recipe/notes.txt", tmp_path / "data")
  assert data.path == str(tmp_path / "data" / "documents.jsonl")
  assert "\n".join(sorted(texts)) and "is a text file, cut into parts" in found.sentence
  with pytest.raises(InputError, match="--data is 'memory://recipe/gone'; expected a text file"):
    data_source.find("memory://recipe/gone")


def test_the_number_of_documents_is_estimated_from_the_beginning(tmp_path, monkeypatch):
  path = write_lines(tmp_path / "a.jsonl", [{"text": f"{i:06}"} for i in range(4000)])
  source = sources.DocumentSource("jsonl", str(path), heldout_fraction=0.0)
  assert len(beginning.read(source).documents) == 4000 and beginning.read(source).scale == 1
  monkeypatch.setattr(sources, "BLOCK_BYTES", 1000)
  monkeypatch.setattr(beginning, "ENOUGH", 20_000)
  found = beginning.read(source)
  assert len(found.documents) < 1500
  assert len(found.documents) * found.scale == pytest.approx(4000, rel=0.05)
  # The size of a compressed file is not that of its contents, so that all of it is read.
  (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
  packed = beginning.read(dataclasses.replace(source, path=f"{path}.gz"))
  assert len(packed.documents) * packed.scale == 4000
