"""Tiny Hugging Face folders, written by transformers."""

from pathlib import Path

import pytest
import tiny

TEMPLATE = (
  "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<e>{% endfor %}"
  "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def write_model(folder: Path, layers: int = 2, seed: int = 0, **tokenizer) -> Path:
  """A random Llama with a tokenizer of one token per byte and two special ones."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(seed)
  config = transformers.LlamaConfig(
    vocab_size=258,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=layers,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    tie_word_embeddings=True,
    eos_token_id=256,
  )
  transformers.LlamaForCausalLM(config).save_pretrained(folder)
  write_tokenizer(folder, **tokenizer)
  return folder


def write_tokenizer(folder: Path, template: str = TEMPLATE, extra: str = "<e>") -> None:
  transformers = pytest.importorskip("transformers")
  file = tiny.write_tokenizer(folder / "bytes.json")
  tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="</s>")
  tokenizer.add_special_tokens({"additional_special_tokens": [extra]})
  if template:
    tokenizer.chat_template = template
  tokenizer.save_pretrained(folder)
  file.unlink()
