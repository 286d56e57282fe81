"""Folders of adapters are loaded by PEFT on the transformers model of every family, or refused."""

import jax
import pytest
import slow
from safetensors.numpy import load_file

from distill_jax import registry
from distill_jax.errors import InputError
from distill_jax.hub.peft import export_adapters
from distill_jax.nn import lora

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

TARGETS = {
  "bert": ("query", "output.dense"),
  "whisper": ("q_proj", "fc1"),
  "t5": ("q", "wo"),
  "marian": ("q_proj", "fc1"),
  "clip": ("q_proj", "fc1"),
  "convnext": ("pwconv1",),
  "llava": ("q_proj", "down_proj"),
  "llama": ("q_proj", "down_proj"),
}
TASKS = {"t5": "SEQ_2_SEQ_LM", "marian": "SEQ_2_SEQ_LM", "llama": "CAUSAL_LM"}


def export(kind, targets, target):
  """Exports random adapters of a tiny model; returns the transformers model of its config."""
  family = registry.load("models", kind)
  model = jax.eval_shape(lambda: family.Model(family.TINY, jax.random.key(0)))
  spec = lora.LoraOptions(rank=2, targets=targets)
  adapters = jax.jit(lambda key: lora.init(model, spec, key))(jax.random.key(1))
  export_adapters(
    adapters, spec, target, config=family.TINY, base=None, tokenizer=None, card="", dtype="float32"
  )
  hf = family.TINY.to_hf()
  theirs = getattr(transformers, hf["architectures"][0])
  return theirs(theirs.config_class.from_dict(hf)).eval()


def inputs(config, kind):
  ids = torch.tensor([[1, 2, 3]])
  if kind == "whisper":
    mel = torch.zeros(1, config.num_mel_bins, 2 * config.max_source_positions)
    return {"input_features": mel, "decoder_input_ids": ids}
  if kind == "convnext":
    return {"pixel_values": torch.zeros(1, config.num_channels, 32, 32)}
  if kind == "clip":
    vision = config.vision_config
    pixels = torch.zeros(1, vision.num_channels, vision.image_size, vision.image_size)
    return {"input_ids": ids, "pixel_values": pixels}
  return {"input_ids": ids} | ({"decoder_input_ids": ids} if kind in ("t5", "marian") else {})


@pytest.mark.parametrize("kind", slow.all_but(("bert",), tuple(TARGETS)))
def test_peft_loads_all_adapters_and_computes_with_them(kind, tmp_path):
  base = export(kind, TARGETS[kind], tmp_path / "adapters")
  theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapters")).eval()
  assert theirs.peft_config["default"].task_type == TASKS.get(kind)
  want = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
  got = peft.get_peft_model_state_dict(theirs)
  # PEFT renames LLaVA's layers as transformers 5 does, so that only the numbers can be compared.
  assert sorted(x.numpy().tobytes() for x in got.values()) == sorted(map(bytes, want.values()))
  with torch.no_grad():
    theirs(**inputs(base.config, kind))


@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_layers_that_transformers_has_renamed_are_refused(kind, tmp_path):
  with pytest.raises(InputError, match=f"export.lora is 'peft'; expected .* for {kind}, whose"):
    export(kind, ("query",), tmp_path / "adapters")
  assert not list(tmp_path.iterdir())
