"""Random encoder-decoders of transformers, ours beside them, and inputs for both."""

import jax
import jax.numpy as jnp
import numpy as np
import parity

from distill_jax.nn import fused_head, layers
from distill_jax.types import Inputs, Sounds, SourceTarget

torch, transformers = parity.torch, parity.transformers
V, B, S, T, FRAMES, BINS = 96, 3, 13, 9, 24, 8
IDS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 2, "bos_token_id": 1}
BART = {
  "vocab_size": V,
  "d_model": 48,
  "encoder_layers": 2,
  "encoder_attention_heads": 6,
  "encoder_ffn_dim": 56,
  "decoder_layers": 3,
  "decoder_attention_heads": 4,
  "decoder_ffn_dim": 80,
  "dropout": 0.0,
  **IDS,
}
T5 = {
  "vocab_size": V,
  "d_model": 48,
  "d_kv": 10,
  "d_ff": 80,
  "num_layers": 2,
  "num_heads": 4,
  "num_decoder_layers": 3,
  "feed_forward_proj": "gated-gelu",
  "relative_attention_num_buckets": 8,
  "relative_attention_max_distance": 12,
  "dropout_rate": 0.0,
  **IDS,
}
WHISPER = {
  "num_mel_bins": BINS,
  "max_source_positions": FRAMES // 2,
  "max_target_positions": 20,
  "begin_suppress_tokens": None,
}
CASES = {
  "t5": ("t5", T5 | {"tie_word_embeddings": False}),
  "t5 tied": ("t5", T5 | {"tie_word_embeddings": True}),
  "marian": (
    "marian",
    BART
    | {
      "max_position_embeddings": 64,
      "activation_function": "swish",
      "scale_embedding": True,
      "decoder_vocab_size": V,
      "forced_eos_token_id": None,
    },
  ),
  "whisper": ("whisper", BART | WHISPER),
}
CLASSES = {
  "t5": "T5ForConditionalGeneration",
  "marian": "MarianMTModel",
  "whisper": "WhisperForConditionalGeneration",
}


def torch_model(kind: str, seed: int = 0):
  """A random model whose parameters all matter: norms are not 1, biases not 0."""
  model_type, fields = CASES[kind]
  torch.manual_seed(seed)
  config = transformers.AutoConfig.for_model(model_type, **fields)
  model = getattr(transformers, CLASSES[model_type])._from_config(
    config, attn_implementation="eager"
  )
  model = model.float().eval()
  if kind == "t5":  # transformers 5 ties what has not been loaded
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(V, T5["d_model"]))
  with torch.no_grad():
    more = [("bias", model.final_logits_bias)] if kind == "marian" else []
    for name, p in [*model.named_parameters(), *more]:
      if not name.endswith("embed_positions.weight") or p.requires_grad:
        p.copy_(int("norm" in name and name.endswith("weight")) + 0.2 * torch.randn_like(p))
  return model


def texts(rng, length: int, shortest: int) -> tuple[np.ndarray, np.ndarray]:
  """(tokens, segments), padded at the end; the first row is full."""
  tokens = rng.integers(3, V, (B, length)).astype(np.int32)
  lengths = np.array([length, *rng.integers(shortest, length, B - 1)])
  segments = (np.arange(length)[None] < lengths[:, None]).astype(np.int32)
  return tokens * segments, segments


def as_inputs(tokens_BT, segments_BT) -> Inputs:
  places = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32)[None], tokens_BT.shape)
  return Inputs(*map(jnp.asarray, (tokens_BT, places, segments_BT)))


def examples(kind: str):
  """(ours, what transformers is given, labels, mask of labels)."""
  rng = np.random.default_rng(0)
  labels, mask = texts(rng, T, 4)
  targets = np.concatenate([np.full((B, 1), 2, np.int32), labels[:, :-1]], 1)
  given = {"decoder_input_ids": torch.from_numpy(targets).long()}
  if kind == "whisper":
    mel = rng.standard_normal((B, FRAMES, BINS)).astype(np.float32)
    source, given["input_features"] = Sounds(jnp.asarray(mel)), torch.from_numpy(mel).mT
  else:
    tokens, seen = texts(rng, S, 5)
    source = as_inputs(tokens, seen)
    given["input_ids"] = torch.from_numpy(tokens).long()
    given["attention_mask"] = torch.from_numpy(seen).long()
  return SourceTarget(source, as_inputs(targets, mask)), given, labels, mask


def run(model, inputs):
  out = model(inputs, layers.ComputeConfig())
  return fused_head.logits(out.hidden_BTD, out.head_VD)


logits = jax.jit(run)


def open_pair(kind, folder):
  """(the case, transformers' model, its folder, ours)."""
  theirs = torch_model(kind)
  return kind, theirs, folder, parity.ours_from(theirs, folder)
