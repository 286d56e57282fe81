"""What the tests of every family share: a random model of transformers, ours from it, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.hub import declared, load
from distill_jax.hub.pretrained import open_model
from distill_jax.nn import fused_head, layers, params, sharding
from distill_jax.types import Inputs

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BASE = {
  "vocab_size": 97,
  "hidden_size": 48,
  "intermediate_size": 80,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 12,
  "max_position_embeddings": 512,
  "rms_norm_eps": 1e-5,
}
DEEPSEEK = {
  "num_key_value_heads": 4,
  "head_dim": 6,
  "q_lora_rank": 20,
  "kv_lora_rank": 28,
  "qk_nope_head_dim": 8,
  "qk_rope_head_dim": 6,
  "v_head_dim": 10,
  "first_k_dense_replace": 1,
  "n_routed_experts": 12,
  "num_experts_per_tok": 3,
  "moe_intermediate_size": 20,
  "n_shared_experts": 2,
  "n_group": 4,
  "topk_group": 2,
  "routed_scaling_factor": 1.7,
}
MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
WINDOWS = {
  "use_sliding_window": True,
  "sliding_window": 5,
  "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
# By name, (transformers' model_type, fields of its config that are not torch_model's own).
DECODERS = {
  "deepseek_v3": ("deepseek_v3", DEEPSEEK | {"kv_lora_rank": 24, "num_mtp_layers": 0}),
  "gemma3": ("gemma3_text", {"sliding_window": 5, "sliding_window_pattern": 2}),
  "llama": ("llama", {}),
  "mistral": ("mistral", {"sliding_window": 5}),
  "qwen2": ("qwen2", {"tie_word_embeddings": True}),
  "qwen2_windows": ("qwen2", WINDOWS),
  "qwen3": ("qwen3", {}),
  "qwen3_windows": (
    "qwen3",
    {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
  ),
  "qwen3_moe": ("qwen3_moe", MOE),
}
B, T = 2, 96
# In units of the largest value: float32 keeps 6e-8, three layers in another order of
# addition lose 4e-6 here (seen, the worst of all cases), gradients 1e-5. Times three.
FORWARD, GRADIENT = 1.3e-5, 3e-5


def torch_model(model_type: str, seed: int = 0, **changes):
  """A random model of transformers whose parameters all matter: norms are not 1, biases not 0."""
  torch.manual_seed(seed)
  config = transformers.AutoConfig.for_model(model_type, **{**BASE, **changes})
  model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
  model = model.float().eval()
  with torch.no_grad():
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
      if "inv_freq" in name or "embed_scale" in name:
        continue
      around_1 = "norm" in name and not model_type.startswith("gemma")
      p.copy_(int(around_1) + 0.2 * torch.randn_like(p))
  return model


def ours_from(model, folder, mesh=None):
  """What transformers wrote, as we read it."""
  model.save_pretrained(folder)
  mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
  return load.load_model(open_model(str(folder)), mesh, layers.ComputeConfig())


def plain_inputs(tokens_BT: np.ndarray) -> Inputs:
  B, T = tokens_BT.shape
  positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
  return Inputs(*map(jnp.asarray, (tokens_BT, positions, np.ones((B, T), np.int32))))


def torch_outputs(model, tokens_BT: np.ndarray) -> tuple[list, np.ndarray, np.ndarray]:
  """([the embeddings, each layer's output], the final norm's, logits)."""
  kept: list[np.ndarray] = []
  keep = lambda m, i, out: kept.append((out if torch.is_tensor(out) else out[0]).detach().numpy())
  first = lambda m, args: kept.append(args[0].detach().numpy())
  hooks = [m.register_forward_hook(keep) for m in [*model.model.layers, model.model.norm]]
  hooks.append(model.model.layers[0].register_forward_pre_hook(first))
  with torch.no_grad():
    logits = model(torch.from_numpy(tokens_BT).long()).logits.numpy()
  for h in hooks:
    h.remove()
  return kept[:-1], kept[-1], logits


def tokens(seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, BASE["vocab_size"], (B, T)).astype(np.int32)


def error(ours, theirs) -> float:
  """The largest difference, in units of the largest value."""
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  assert ours.shape == theirs.shape
  return np.abs(ours - theirs).max() / np.abs(theirs).max()


def forward_errors(theirs, ours, tokens_BT: np.ndarray) -> list[float]:
  """Of the embeddings, each layer, the final norm and the logits."""
  taps = tuple(range(ours.config.num_hidden_layers))
  out = jax.jit(lambda m, i: m(i, layers.ComputeConfig(), taps))(ours, plain_inputs(tokens_BT))
  (embedded, *want_layers), want_hidden, want_logits = torch_outputs(theirs, tokens_BT)
  errors = [error(np.asarray(ours.embed[...])[tokens_BT] * ours.config.embed_scale, embedded)]
  errors += [error(out.taps_PBTD[i], w) for i, w in enumerate(want_layers)]
  logits_BTV = fused_head.soft_cap(out.hidden_BTD @ out.head_VD.T, out.soft_cap)
  return [*errors, error(out.hidden_BTD, want_hidden), error(logits_BTV, want_logits)]


def worst_gradient(theirs, ours, tokens_BT: np.ndarray) -> tuple[float, str]:
  """(the largest error of any parameter's gradient of the cross-entropy, its name)."""
  torch_tokens = torch.from_numpy(tokens_BT).long()
  theirs(torch_tokens, labels=torch_tokens).loss.backward()
  want = dict(_one_by_one((name, p.grad.numpy()) for name, p in theirs.named_parameters()))

  def loss(model):
    out = model(plain_inputs(tokens_BT), layers.ComputeConfig())
    z_BTV = fused_head.soft_cap(out.hidden_BTD[:, :-1] @ out.head_VD.T, out.soft_cap)
    logp_BTV = jax.nn.log_softmax(z_BTV)
    return -jnp.mean(jnp.take_along_axis(logp_BTV, tokens_BT[:, 1:, None], -1))

  got = {}
  for _, v in params.named_params(jax.jit(jax.grad(loss))(ours)):
    for name, at in declared.tensors(v):
      got[name] = declared.Layout(v).to_stored(np.asarray(v[...])[at], np.dtype(np.float32))
  for name in got.keys() & dict(theirs.named_buffers()).keys():  # torch trains no buffers
    assert not got.pop(name).any()
  assert got.keys() == want.keys()
  return max((error(got[n], want[n]), n) for n in want)


def _one_by_one(named):
  """transformers fuses experts in memory; on disk, and here, each has its own tensors."""
  for name, x in named:
    if not name.endswith((".gate_up_proj", "experts.down_proj")):
      yield name, x
      continue
    at, _, kind = name.rpartition(".")
    for i, expert in enumerate(x):
      parts = np.split(expert, 2) if kind == "gate_up_proj" else [expert]
      names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
      yield from ((f"{at}.{i}.{n}.weight", part) for n, part in zip(names, parts, strict=True))


def plain_logits(model, tokens_BT, compute=layers.ComputeConfig()):  # noqa: B008
  """float32 [B, T, V], of a model without a soft cap."""
  out = jax.jit(lambda m, i: m(i, compute))(model, plain_inputs(tokens_BT))
  return np.asarray(out.hidden_BTD @ out.head_VD.T)
