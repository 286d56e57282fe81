"""Vocabularies in GGUF files for tests: files without weights, and llama.cpp's rule for scores."""

import gguf
import real_tokenizers

from distill_jax.hub.gguf_vocabulary import vocabulary

KINDS = {
  bool: gguf.GGUFValueType.BOOL,
  int: gguf.GGUFValueType.UINT32,
  str: gguf.GGUFValueType.STRING,
  list: gguf.GGUFValueType.ARRAY,
}


def entries_of(name):
  """The metadata of a published tokenizer, with five rows that have no token."""
  rows = real_tokenizers.REAL[name][1] + 5
  eos = real_tokenizers.load(name).token_id(real_tokenizers.REAL[name][2][0])
  return vocabulary(real_tokenizers.files(name), {"vocab_size": rows, "eos_token_id": eos}, {})


def write(path, entries):
  """Writes a file from which llama.cpp loads a vocabulary."""
  writer = gguf.GGUFWriter(path, "llama")
  for key, value in entries:
    writer.add_key_value(key, value, KINDS[type(value)])
  writer.add_context_length(64)
  writer.add_embedding_length(32)
  writer.add_block_count(1)
  writer.add_feed_forward_length(32)
  writer.add_head_count(2)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_ti_data_to_file()
  writer.close()


def by_score(meta, text):
  """The ids of a text without special tokens: the best pair is merged first, then the leftmost."""
  ids = {token: i for i, token in enumerate(meta["tokens"])}
  parts = list((" " * meta["add_space_prefix"] + text).replace(" ", "\u2581"))
  while True:
    pairs = [(i, a + b) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))]
    found = [(-meta["scores"][ids[both]], i) for i, both in pairs if both in ids]
    if not found:
      break
    _, i = min(found)
    parts[i : i + 2] = [parts[i] + parts[i + 1]]
  out = []
  for part in parts:
    byte_ids = (ids[f"<0x{b:02X}>"] for b in part.encode())
    out += [ids[part]] if part in ids else byte_ids
  return out
