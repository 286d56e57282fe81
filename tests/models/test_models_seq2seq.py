"""T5, Marian and Whisper against transformers: states, logits, gradients, in and out."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from distill_jax import registry
from distill_jax.errors import InputError
from distill_jax.hub import declared, load
from distill_jax.hub import export as hub_export
from distill_jax.hub.pretrained import open_model
from distill_jax.nn import fused_head, layers, params, sharding
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


def said(model, inputs):
  out = model(inputs, layers.ComputeConfig())
  return fused_head.logits(out.hidden_BTD, out.head_VD)


logits = jax.jit(said)


@jax.jit
def states(model, inputs):
  """The encoder's output, what of it is no padding, and two layers' of the decoder."""
  taps = model(inputs, layers.ComputeConfig(), (0, 1)).taps_PBTD
  return *model.encode(inputs.source, layers.ComputeConfig()), taps


@pytest.fixture(scope="module", params=CASES)
def both(request, tmp_path_factory):
  """(the case, transformers' model, its folder, ours)."""
  theirs, at = torch_model(request.param), tmp_path_factory.mktemp("theirs")
  return request.param, theirs, at, parity.ours_from(theirs, at)


@pytest.fixture(scope="module")
def exported(both):
  target = both[2] / "exported"
  hub_export.export_model(both[3], target, tokenizer=None, generation={}, card="", dtype="float32")
  return target


def test_states_and_logits(both):
  kind, theirs, _, ours = both
  inputs, given, _, mask = examples(kind)
  with torch.no_grad():
    want = theirs(**given, output_hidden_states=True)
  memory, seen, taps = states(ours, inputs)
  real = np.ones(memory.shape[:2], bool) if seen is None else np.asarray(seen)
  theirs_BSD = want.encoder_last_hidden_state.numpy()
  # In units of the largest value, as parity.FORWARD: seen, 2e-6.
  assert parity.error(np.asarray(memory)[real], theirs_BSD[real]) < parity.FORWARD
  assert parity.error(logits(ours, inputs), want.logits.numpy()) < parity.FORWARD
  for tap, theirs_BTD in zip(taps, want.decoder_hidden_states[1:], strict=False):
    assert parity.error(tap, theirs_BTD.numpy()) < parity.FORWARD


def test_gradients(both):
  kind, theirs, _, ours = both
  inputs, given, labels, mask = examples(kind)
  theirs.zero_grad()
  z = theirs(**given).logits
  target = torch.from_numpy(np.where(mask > 0, labels, -100)).long()
  torch.nn.functional.cross_entropy(z.reshape(-1, V), target.reshape(-1)).backward()
  want = {n: p.grad.numpy() for n, p in theirs.named_parameters() if p.grad is not None}

  def loss(model):
    logp = jax.nn.log_softmax(said(model, inputs))
    picked = jnp.take_along_axis(logp, labels[..., None], -1)[..., 0]
    return -jnp.sum(picked * mask) / mask.sum()

  got = {}
  for _, v in params.named_params(jax.jit(jax.grad(loss))(ours)):
    for name, at in declared.tensors(v):
      got[name] = declared.Layout(v).to_stored(np.asarray(v[...])[at], np.dtype(np.float32))
  untrained = {n for n in got if n not in want}
  assert untrained <= {"model.encoder.embed_positions.weight", "final_logits_bias"}
  if kind == "whisper":
    assert not got["model.encoder.embed_positions.weight"].any()
  assert got.keys() - untrained == want.keys()
  for name in [n for n in want if n.endswith("k_proj.bias")]:  # scores move alike: it has none
    assert max(np.abs(got.pop(name)).max(), np.abs(want.pop(name)).max()) < 1e-6
  worst = max((parity.error(got[n], want[n]), n) for n in want)
  # T5 does not scale its scores, which are large here: 4.1e-5 seen, the others 1e-5.
  assert worst[0] < (1e-4 if kind.startswith("t5") else parity.GRADIENT), worst


def test_out_and_into_transformers_again(both, exported):
  kind, theirs, at, _ = both

  def tensors(path):
    with safe_open(path / "model.safetensors", "numpy") as f:
      return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118

  got, want = tensors(exported), tensors(at)
  assert got.keys() == want.keys()
  for name, x in want.items():
    np.testing.assert_array_equal(got[name], x, err_msg=name)
  again, loaded = type(theirs).from_pretrained(
    exported, attn_implementation="eager", output_loading_info=True
  )
  assert not any(loaded[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  given = examples(kind)[1]
  with torch.no_grad():
    # The same weights through the same code: to the last bit.
    assert torch.equal(again(**given).logits, theirs(**given).logits)
  of = lambda path: open_model(str(path)).config
  assert of(exported) == of(at)
  name = json.loads((at / "config.json").read_text())["architectures"]
  assert json.loads((exported / "config.json").read_text())["architectures"] == name


def test_a_mesh_computes_the_same(both):
  kind, _, at, ours = both
  inputs, *_ = examples(kind)
  mesh = sharding.make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
  four = jax.tree.map(lambda x: jnp.concatenate([x, x[:1]]), inputs)
  with jax.set_mesh(mesh):
    spread = load.load_model(open_model(str(at)), mesh, layers.ComputeConfig())
    got = logits(spread, four)
  assert parity.error(got, logits(ours, four)) < parity.FORWARD


def test_decoder_layers_can_be_kept(both):
  _, _, at, ours = both
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  small = load.load_model(open_model(str(at)), mesh, layers.ComputeConfig(), keep_layers=(0, 2))
  assert small.config == ours.config.keep_layers((0, 2))
  taken = jax.tree.map(lambda x: x[jnp.asarray([0, 2])], ours.layers)
  for got, want in ((small.layers, taken), (small.encoder, ours.encoder)):
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_nobody_sees_what_comes_later_or_padding_of_the_source(both):
  kind, _, _, ours = both
  inputs, *_ = examples(kind)
  before = np.asarray(logits(ours, inputs))
  later = inputs.target.tokens_BT.at[:, 5:].set(7)
  after = logits(ours, inputs.replace(target=inputs.target.replace(tokens_BT=later)))
  np.testing.assert_array_equal(before[:, :5], after[:, :5])
  assert (before[:, 5:] != after[:, 5:]).any()
  if kind != "whisper":
    pad = inputs.source.segments_BT == 0
    source = inputs.source.replace(tokens_BT=jnp.where(pad, 7, inputs.source.tokens_BT))
    np.testing.assert_array_equal(before, logits(ours, inputs.replace(source=source)))


@pytest.mark.parametrize(
  "family, changes, says",
  [
    ("t5", {"feed_forward_proj": "relu"}, "feed_forward_proj='relu'; the t5 family has 'gated"),
    ("t5", {"d_kv": 0}, "d_kv is 0"),
    ("t5", {"relative_attention_num_buckets": 6}, "there are 6 buckets"),
    ("marian", {"decoder_vocab_size": 7}, "decoder_vocab_size=7; the marian family has one table"),
    ("marian", {"encoder_attention_heads": 5}, "there are 5 heads"),
    ("whisper", {"scale_embedding": True}, "scale_embedding=True; the whisper family has False"),
  ],
)
def test_what_a_family_cannot_do_is_refused(family, changes, says):
  module = registry.load("models", family)
  assert module.Config.from_hf(module.TINY.to_hf()) == module.TINY
  with pytest.raises(InputError, match=says):
    module.Config.from_hf(module.TINY.to_hf() | changes)


def test_whisper_refuses_sounds_of_another_length():
  module = registry.load("models", "whisper")
  model = jax.eval_shape(lambda key: module.Model(module.TINY, key), jax.random.key(0))
  sounds = Sounds(jax.ShapeDtypeStruct((1, 30, 8), jnp.float32))
  with pytest.raises(InputError, match="30 frames and whisper reads 32"):
    jax.eval_shape(lambda m, s: m.encode(s, layers.ComputeConfig()), model, sounds)


def test_a_tied_t5_with_another_head_is_refused(tmp_path):
  theirs = torch_model("t5 tied")
  parity.ours_from(theirs, tmp_path / "tied")
  with safe_open(tmp_path / "tied/model.safetensors", "numpy") as f:
    weights = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  for head_VD, fits in ((weights["shared.weight"], True), (weights["shared.weight"] + 1, False)):
    save_file(weights | {"lm_head.weight": head_VD.copy()}, tmp_path / "tied/model.safetensors")
    source = open_model(str(tmp_path / "tied"))
    if fits:
      load.load_model(source, mesh, layers.ComputeConfig())
      continue
    with pytest.raises(InputError, match="ties its embeddings and holds another lm_head.weight"):
      load.load_model(source, mesh, layers.ComputeConfig())
