"""Folders of integer weights in a real vLLM server.

On CPUs vLLM multiplies integers only with bfloat16 or float16 numbers. float16 is the more exact
of the two, so its log-probabilities are compared with ours in float32.
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
# The mean of |difference| over positions and tokens. float16 has 11 bits, and so 3 layers of sums
# over 256 products differ by some 1e-3. In int8, inputs of layers are rounded to 8 bits, too.
TOLERANCE = {"int4": 4e-3, "int8": 4e-2}


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
  with vllm_server.serving(tmp_path / "out", "student", "float16", *count) as url:
    request = {"model": "student", "prompt": TOKENS, "max_tokens": 1, "prompt_logprobs": 258}
    answer = httpx2.post(f"{url}/completions", json=request, timeout=120).json()
  found = answer["choices"][0]["prompt_logprobs"][1:]
  gap = [
    abs(about["logprob"] - ours[i, int(token)])
    for i, ids in enumerate(found)
    for token, about in ids.items()
  ]
  assert len(gap) == 258 * (len(TOKENS) - 1)
  print(f"{integers}: mean |difference| {np.mean(gap):.2e}, largest {np.max(gap):.2e}")
  assert np.mean(gap) < TOLERANCE[integers.grid]
