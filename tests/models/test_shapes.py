"""Published shapes: as many parameters as published, and as transformers makes of them."""

import jax
import parity
import pytest
import tiny

from distill_jax import registry
from distill_jax.models import FamilyConfig
from distill_jax.nn import params

torch, transformers = parity.torch, parity.transformers

# From the models' safetensors on the Hub, with a tied head counted once.
PUBLISHED = {
  ("deepseek_v3", "deepseek-v3"): 671_026_419_200,  # without the layer of multi-token prediction
  ("gemma3", "gemma-3-1b"): 999_885_952,
  ("gemma3", "gemma-3-4b"): 3_880_263_168,  # the text model; with its vision tower, 4,300,079,472
  ("llama", "smollm2-135m"): 134_515_008,
  ("llama", "llama-3.2-1b"): 1_235_814_400,
  ("llama", "llama-3.2-3b"): 3_212_749_824,
  ("llama", "llama-3.1-8b"): 8_030_261_248,
  ("llama", "llama-3.3-70b"): 70_553_706_496,
  ("llama", "mistral-7b-v0.1"): 7_241_732_096,
  ("qwen2", "qwen2.5-0.5b"): 494_032_768,
  ("qwen2", "qwen2.5-1.5b"): 1_543_714_304,
  ("qwen2", "qwen2.5-7b"): 7_615_616_512,
  ("qwen2", "qwen2.5-14b"): 14_770_033_664,
  ("qwen2", "qwen2.5-32b"): 32_763_876_352,
  ("qwen3", "qwen3-0.6b"): 596_049_920,
  ("qwen3", "qwen3-1.7b"): 1_720_574_976,
  ("qwen3", "qwen3-4b"): 4_022_468_096,
  ("qwen3", "qwen3-8b"): 8_190_735_360,
  ("qwen3", "qwen3-14b"): 14_768_307_200,
  ("qwen3", "qwen3-32b"): 32_762_123_264,
  ("qwen3", "qwen3-30b-a3b"): 30_532_122_624,
}


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
