"""Published shapes: as many parameters as published, and as transformers makes of them."""

import jax
import parity
import pytest
import tiny
from published import PUBLISHED

from distill_jax import registry
from distill_jax.models import FamilyConfig
from distill_jax.nn import params

torch, transformers = parity.torch, parity.transformers


def test_every_published_shape_is_tested():
  named = {(f, n) for f in tiny.decoder_families() for n in registry.load("models", f).CONFIGS}
  assert {(f, n) for f, n in named if not n.startswith("tiny")} == PUBLISHED.keys()


@pytest.mark.parametrize("which", PUBLISHED, ids=lambda w: w[1])
def test_a_shape_has_its_published_size(which):
  module = registry.load("models", which[0])
  config = module.CONFIGS[which[1]]
  model = jax.eval_shape(lambda key: module.Model(config, key), jax.random.key(0))
  assert params.count(model) == PUBLISHED[which]
  assert module.Config.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("family", registry.names("models"))
def test_every_family_follows_the_protocol(family):
  module = registry.load("models", family)
  assert module.CONFIGS["tiny"] == module.TINY and module.HF_MODEL_TYPES
  assert isinstance(module.TINY, FamilyConfig) and isinstance(module.TINY, module.Config)
  model = jax.eval_shape(lambda key: module.Model(module.TINY, key), jax.random.key(0))
  assert model.config == module.TINY and callable(model)


# One of each kind. transformers builds a model from our config.json, without memory.
KINDS = [
  "llama-3.2-1b",
  "mistral-7b-v0.1",
  "qwen2.5-7b",
  "qwen3-4b",
  "qwen3-30b-a3b",
  "gemma-3-4b",
  "deepseek-v3",
]


@pytest.mark.parametrize("name", KINDS)
def test_transformers_reads_our_config_json(name):
  family = next(f for f, n in PUBLISHED if n == name)
  hf = registry.load("models", family).CONFIGS[name].to_hf()
  config = transformers.AutoConfig.for_model(**hf)
  with torch.device("meta"):
    model = transformers.AutoModelForCausalLM.from_config(config)
  kept = [*model.parameters(), *(b for n, b in model.named_buffers() if "correction" in n)]
  assert sum(p.numel() for p in kept) == PUBLISHED[family, name]
