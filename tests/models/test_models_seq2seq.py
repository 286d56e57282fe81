"""T5, Marian and Whisper against transformers: states, logits, gradients, in and out."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import slow
from safetensors import safe_open
from safetensors.numpy import save_file
from seq2seq_pairs import CASES, V, examples, logits, open_pair, run, torch_model

from distill_jax import registry
from distill_jax.errors import InputError
from distill_jax.hub import declared, load
from distill_jax.hub import export as hub_export
from distill_jax.hub.pretrained import open_model
from distill_jax.nn import layers, params, sharding
from distill_jax.types import Sounds

torch, transformers = parity.torch, parity.transformers


@jax.jit
def states(model, inputs):
  """Returns the encoder's output, its padding mask, and the outputs of two decoder layers."""
  taps = model(inputs, layers.ComputeConfig(), (0, 1)).taps_PBTD
  return *model.encode(inputs.source, layers.ComputeConfig()), taps


@pytest.fixture(scope="module", params=slow.all_but(("t5", "marian", "whisper"), CASES))
def both(request, tmp_path_factory):
  """(the case, the model in transformers, its folder, our model)."""
  return open_pair(request.param, tmp_path_factory.mktemp("theirs"))


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
    logp = jax.nn.log_softmax(run(model, inputs))
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
  for name in [n for n in want if n.endswith("k_proj.bias")]:  # 0 up to rounding
    assert max(np.abs(got.pop(name)).max(), np.abs(want.pop(name)).max()) < 1e-6
  worst = max((parity.error(got[n], want[n]), n) for n in want)
  # T5 does not scale its scores, which are large here: 4.1e-5 observed, others 1e-5.
  assert worst[0] < (1e-4 if kind.startswith("t5") else parity.GRADIENT), worst


def test_an_export_round_trips_through_transformers(both, exported):
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


def test_attention_excludes_later_positions_and_source_padding(both):
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
    (
      "t5",
      {"feed_forward_proj": "relu"},
      "feed_forward_proj in config.json is 'relu'; expected 'gated",
    ),
    ("t5", {"d_kv": 0}, "d_kv is 0"),
    ("t5", {"relative_attention_num_buckets": 6}, "num_buckets is 6; expected a multiple of 4"),
    ("marian", {"decoder_vocab_size": 7}, "decoder_vocab_size in config.json is 7; expected 256"),
    (
      "marian",
      {"encoder_attention_heads": 5},
      "hidden_size is 32; expected a multiple of num_attention_heads, 5",
    ),
    (
      "whisper",
      {"scale_embedding": True},
      "scale_embedding in config.json is True; expected False",
    ),
  ],
)
def test_unsupported_values_are_refused(family, changes, says):
  module = registry.load("models", family)
  assert module.Config.from_hf(module.TINY.to_hf()) == module.TINY
  with pytest.raises(InputError, match=says):
    module.Config.from_hf(module.TINY.to_hf() | changes)


def test_whisper_refuses_sounds_of_another_length():
  module = registry.load("models", "whisper")
  model = jax.eval_shape(lambda key: module.Model(module.TINY, key), jax.random.key(0))
  sounds = Sounds(jax.ShapeDtypeStruct((1, 30, 8), jnp.float32))
  with pytest.raises(InputError, match="frames of a sound is 30; expected 32"):
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
    with pytest.raises(InputError, match="ties its embeddings, but its lm_head.weight differs"):
      load.load_model(source, mesh, layers.ComputeConfig())
