"""BERT beside transformers, as a classifier and as a sentence encoder."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import error
from safetensors.numpy import load_file, save_file

from distill_jax.errors import InputError
from distill_jax.hub import declared, export, load
from distill_jax.hub.pretrained import open_model
from distill_jax.models import loading, standalone
from distill_jax.models.options import ModelOptions
from distill_jax.nn import layers, params, sharding
from distill_jax.types import Inputs

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SHAPE = {
  "vocab_size": 97,
  "hidden_size": 48,
  "intermediate_size": 80,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_labels": 3,
  "max_position_embeddings": 40,
}
B, S = 3, 10
# Tolerances relative to the largest value: three times the observed 6e-7 and 3e-6 of float32.
FORWARD, GRADIENT = 2e-6, 1e-5
MESH = sharding.make_mesh(devices=jax.devices()[:1])


def theirs(kind):
  torch.manual_seed(0)
  model = kind(transformers.BertConfig(**SHAPE)).eval()
  with torch.no_grad():
    for name, p in model.named_parameters():
      p.copy_(("LayerNorm.weight" in name) + 0.2 * torch.randn_like(p))
  return model


def batch():
  tokens = np.random.default_rng(0).integers(
    1, 97, (B, S)
  )  # torch trains no row 0.astype(np.int32)
  segments = (np.arange(S)[None] < np.array([[10], [4], [7]])).astype(np.int32)
  places = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))
  return tokens, segments, Inputs(*map(jnp.asarray, (tokens, places, segments)))


def test_a_classifier_matches_transformers(tmp_path):
  """Compares every layer, the logits, and the gradient of every parameter."""
  model = theirs(transformers.BertForSequenceClassification)
  model.save_pretrained(tmp_path / "theirs")
  ours = load.load_model(open_model(str(tmp_path / "theirs")), MESH, layers.ComputeConfig())
  tokens, segments, inputs = batch()
  labels = np.array([0, 2, 1])
  expected = model(
    torch.tensor(tokens).long(),
    attention_mask=torch.tensor(segments),
    labels=torch.tensor(labels),
    output_hidden_states=True,
  )
  expected.loss.backward()
  want = {name: p.grad.numpy() for name, p in model.named_parameters()}

  def loss(m):
    out = m(inputs, layers.ComputeConfig(), (0, 1, 2))
    logp = jax.nn.log_softmax((out.hidden_BTD @ out.head_VD.T)[:, 0])
    return -jnp.mean(logp[jnp.arange(B), labels]), (out, logp)

  grads, (out, logp) = jax.jit(jax.grad(loss, has_aux=True))(ours)
  seen = segments > 0
  for i in range(3):
    hidden = expected.hidden_states[i + 1].detach().numpy()
    assert error(out.taps_PBTD[i][seen], hidden[seen]) < FORWARD
  assert error(logp, torch.log_softmax(expected.logits, -1).detach().numpy()) < FORWARD
  got = {
    name: declared.Layout(v).to_stored(np.asarray(v[...])[at], np.dtype(np.float32))
    for _, v in params.named_params(grads)
    for name, at in declared.tensors(v)
  }
  assert got.keys() == want.keys()
  # A key's bias shifts all scores of a query equally: its gradient is 0 up to rounding.
  worst = max((error(got[n], want[n]), n) for n in want if not n.endswith("key.bias"))
  assert worst[0] < GRADIENT, worst

  export.export_model(
    ours, tmp_path / "ours", tokenizer=None, generation={}, card="", dtype="float32"
  )
  again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
  for name, x in model.state_dict().items():
    assert torch.equal(again.state_dict()[name], x), name


def test_a_sentence_encoder_is_read_without_a_prefix(tmp_path):
  """Embeddings are means over tokens, as in sentence-transformers; exports are BertModels."""
  model = theirs(transformers.BertModel)
  model.save_pretrained(tmp_path / "theirs")
  ours = load.load_model(open_model(str(tmp_path / "theirs")), MESH, layers.ComputeConfig())
  tokens, segments, inputs = batch()
  with torch.no_grad():
    x = model(torch.tensor(tokens).long(), attention_mask=torch.tensor(segments)).last_hidden_state
  mean = np.stack([x[b, segments[b] > 0].numpy().mean(0) for b in range(B)])
  out = jax.jit(lambda m: m(inputs, layers.ComputeConfig()))(ours)
  assert error(out.embedding_BTD[:, 0], mean) < FORWARD
  assert error(out.hidden_BTD[:, 0], mean / np.linalg.norm(mean, axis=-1, keepdims=True)) < FORWARD
  export.export_model(
    ours, tmp_path / "ours", tokenizer=None, generation={}, card="", dtype="float32"
  )
  again = transformers.AutoModel.from_pretrained(tmp_path / "ours")
  for name, value in model.state_dict().items():
    assert torch.equal(again.state_dict()[name], value), name


def published(folder, **pooling):
  """Writes a sentence encoder with the files of sentence-transformers."""
  model = theirs(transformers.BertModel)
  model.save_pretrained(folder)
  kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
  modules = [{"path": p, "type": f"sentence_transformers.models.{k}"} for p, k in kinds.items()]
  (folder / "modules.json").write_text(json.dumps(modules))
  (folder / "1_Pooling").mkdir()
  (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
  return model


CLS = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}


def test_an_embedding_can_be_the_first_token(tmp_path):
  """BAAI/bge models have this configuration. An export has the same files and can be opened."""
  model = published(tmp_path / "theirs", word_embedding_dimension=48, **CLS)
  tokens, segments, inputs = batch()
  with torch.no_grad():
    x = model(torch.tensor(tokens).long(), attention_mask=torch.tensor(segments)).last_hidden_state
  ours = load.load_model(open_model(str(tmp_path / "theirs")), MESH, layers.ComputeConfig())
  out = jax.jit(lambda m: m(inputs, layers.ComputeConfig()))(ours)
  assert error(out.embedding_BTD[:, 0], x[:, 0]) < FORWARD
  assert error(out.hidden_BTD[:, 0], torch.nn.functional.normalize(x[:, 0])) < FORWARD
  standalone.export_model(ours, tmp_path / "ours", dtype="float32")
  written = json.loads((tmp_path / "ours/1_Pooling/config.json").read_text())
  assert written == {"word_embedding_dimension": 48, **CLS}
  assert open_model(str(tmp_path / "ours")).config == ours.config
  again = transformers.AutoModel.from_pretrained(tmp_path / "ours")
  assert all(torch.equal(again.state_dict()[name], v) for name, v in model.state_dict().items())


def test_other_embeddings_are_refused(tmp_path):
  published(tmp_path, pooling_mode_cls_token=True)  # and the mean, which is the default
  with pytest.raises(InputError, match="the pooling is .*mean_tokens.*; expected one of"):
    open_model(str(tmp_path))
  modules = json.loads((tmp_path / "modules.json").read_text())
  modules += [{"path": "3_Dense", "type": "sentence_transformers.models.Dense"}]
  (tmp_path / "modules.json").write_text(json.dumps(modules))
  with pytest.raises(InputError, match="type is 'Dense'; expected one of Transformer"):
    open_model(str(tmp_path))


def test_the_names_of_norms_from_tensorflow_are_read(tmp_path):
  """Like bert-base-uncased, with gamma for weight and beta for bias."""
  theirs(transformers.BertModel).save_pretrained(tmp_path)
  file = tmp_path / "model.safetensors"
  named = load_file(file)
  old = lambda n: n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")
  save_file({old(n): x for n, x in named.items()}, file, metadata={"format": "pt"})
  want = transformers.BertModel.from_pretrained(tmp_path).embeddings.LayerNorm
  ours = load.load_model(open_model(str(tmp_path)), MESH, layers.ComputeConfig())
  np.testing.assert_array_equal(ours.norm[...], want.weight.detach())
  np.testing.assert_array_equal(ours.norm_bias[...], want.bias.detach())
  both = "embeddings.LayerNorm.weight"
  save_file({old(n): x for n, x in named.items()} | {both: named[both]}, file)
  with pytest.raises(InputError, match="LayerNorm.gamma and .*LayerNorm.weight are the same"):
    _ = open_model(str(tmp_path)).weights


def test_a_new_head_is_initialised_on_request(tmp_path):
  theirs(transformers.BertModel).save_pretrained(tmp_path / "body")
  spec = ModelOptions(source=str(tmp_path / "body"), changes={"num_labels": 5}, new=("classifier",))
  key = jax.random.key(0)
  model = loading.open_source(spec).load(MESH, key).model
  assert model.head.shape == (5, 48) and 0 < float(jnp.std(model.head[...])) < 0.1
  again = loading.open_source(spec).load(MESH, jax.random.key(1)).model
  assert not np.array_equal(model.head[...], again.head[...])
  np.testing.assert_array_equal(model.embed[...], again.embed[...])
  with pytest.raises(
    InputError, match="lacks the tensor classifier.*add the prefix of the name to `new`"
  ):
    loading.open_source(ModelOptions(source=spec.source, changes={"num_labels": 5})).load(MESH, key)
  with pytest.raises(InputError, match="new is .'klassifier',.; expected prefixes"):
    loading.open_source(
      ModelOptions(source=spec.source, changes=spec.changes, new=("klassifier",))
    ).load(MESH, key)
