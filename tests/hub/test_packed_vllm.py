"""Folders of integer weights in a real vLLM server.

On CPUs vLLM 0.32 multiplies int4 weights with float16 or bfloat16 numbers, the first of which are
the more exact, and int8 weights with bfloat16 numbers alone. Ours are float32.
"""

import httpx2
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny_transformers
import vllm_server

from distill_jax.hub import export, load
from distill_jax.hub.pretrained import open_model
from distill_jax.hub.tokenizer import read_tokenizer
from distill_jax.nn import layers, sharding
from distill_jax.nn.quantise import QuantiseOptions

pytestmark = [pytest.mark.slow, vllm_server.needed]
SHAPE = {"vocab_size": 258, "hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
TOKENS = [int(i) for i in np.random.default_rng(0).integers(0, 256, 48)]
# By grid: the dtype of the server, and the largest mean of |difference| of log-probabilities. It is
# twice what was seen: by sums in float16; by sums in bfloat16 of inputs that are rounded to 8 bits.
# Log-probabilities differ by 2 and more if integers or scales are at a wrong place.
SERVED = {"int4": ("float16", 1.5e-2), "int8": ("bfloat16", 3e-1)}


@pytest.mark.parametrize("integers", [QuantiseOptions("int4", 32), QuantiseOptions("int8")])
def test_the_log_probabilities_are_ours(integers, tmp_path):

  theirs = parity.torch_model("llama", **SHAPE)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  read = lambda path: load.load_model(open_model(str(path)), mesh, layers.ComputeConfig())
  made = parity.ours_from(theirs, tmp_path / "float")
  tiny_transformers.write_tokenizer(tmp_path / "float")
  tokenizer = read_tokenizer(str(tmp_path / "float"))
  options = {"tokenizer": tokenizer, "generation": {}, "card": "# card\n"}
  export.export_model(made, tmp_path / "out", **options, integers=integers)
  ours = parity.plain_logits(read(tmp_path / "out"), np.array([TOKENS]))[0]
  ours = np.asarray(jax.nn.log_softmax(jnp.asarray(ours), -1))
  count = ["--max-model-len", "128", "--max-logprobs", "300"]
  dtype, tolerance = SERVED[integers.grid]
  with vllm_server.serving(tmp_path / "out", "student", dtype, *count) as url:
    request = {"model": "student", "prompt": TOKENS, "max_tokens": 1, "prompt_logprobs": 258}
    answer = httpx2.post(f"{url}/completions", json=request, timeout=120)
  answer.raise_for_status()
  found = answer.json()["choices"][0]["prompt_logprobs"][1:]
  gap = [
    abs(about["logprob"] - ours[i, int(token)])
    for i, ids in enumerate(found)
    for token, about in ids.items()
  ]
  assert len(gap) == 258 * (len(TOKENS) - 1)
  print(f"{integers}: mean |difference| {np.mean(gap):.2e}, largest {np.max(gap):.2e}")
  assert np.mean(gap) < tolerance
