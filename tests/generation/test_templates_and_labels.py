"""Templates, rewritten prompts, votes and pseudo-labels, and label smoothing by agreement."""

import json

import bad_server
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from bad_server import Server
from json_lines import read_lines, write_lines

from distill_jax import config
from distill_jax.commands import generate
from distill_jax.commands.filter import run as filter_samples
from distill_jax.commands.record import run as record
from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.errors import InputError
from distill_jax.losses import ce
from distill_jax.nn import fused_head
from distill_jax.records import token_codec
from distill_jax.records.store import open_store
from distill_jax.runtime.workdir import Workdir
from distill_jax.training import loader
from distill_jax.training import loop as training
from distill_jax.types import Batch, Inputs

REWRITE = "Say this in other words, with all numbers:\n{prompt}"
TEMPLATE = (
  "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
  "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{{ '\\n' }}{% endfor %}"
)
ASK = "{prompt}\nEnd with \\boxed{} around the number."


def teacher(body):
  """Rewrites, solves (two of three answers are correct), and labels, with confidence if good."""
  prompt = bad_server.text_of(body)
  choice = {"finish_reason": "stop"}
  if prompt.startswith("Say this"):
    text = f"<think>\nHm.\n</think>\n\nTell me what {prompt.splitlines()[1]} equals.\n"
  elif prompt.endswith("around the number."):
    a, b = (int(n) for n in prompt.split(" equals")[0].split()[-3::2])
    text = f"It is \\boxed{{{a + b + (body['seed'] % 3 == 0)}}}."
  else:
    text, logp = ("good", np.log(0.875)) if "fine" in prompt else ("bad", np.log(0.5))
    content = [{"token": text, "logprob": logp, "top_logprobs": []}]
    choice["logprobs"] = {"content": content}
  usage = {"prompt_tokens": 1, "completion_tokens": 1}
  return {
    "choices": [choice | {"message": {"content": text}}],
    "usage": usage,
    "prompt_token_ids": [1],
  }


def asked(c, folder, **changes):
  folder.mkdir()
  c.generate.update(changes)
  return generate.run(config.resolve(c), folder)


def kept(c, folder, **filters):
  c.filters, c.filter.order = filters, tuple(filters)
  filter_samples(config.resolve(c), folder)
  return read_lines(folder / "kept/00000.jsonl")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """Returns a folder with rewritten and solved samples, the config, and the server's prompts."""
  folder = tmp_path_factory.mktemp("augment")
  c = tiny.tiny(folder)
  c.teacher.source = ""
  (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
  rows = [{"question": f"{i} + 3", "answer": i + 3} for i in range(10)]
  prompts = write_lines(folder / "prompts.jsonl", rows)
  with Server(answer=teacher) as server:
    c.generate.server.urls, c.generate.chat = (server.url,), True
    asked(c, folder / "re", prompts=str(prompts), field="question", template=REWRITE)
    kept(c, folder / "re", form=config.filter("format"), new=config.filter("near_duplicates"))
    more = {"prompts": str(folder / "re/kept/00000.jsonl"), "field": "text", "template": ASK}
    asked(c, folder / "so", samples=6, **more)
    questions = [bad_server.text_of(body) for body in server.bodies]
  return folder, c, questions


def test_rewritten_prompts_keep_their_answers(made):
  folder, _, questions = made
  assert questions.count("Say this in other words, with all numbers:\n4 + 3") == 1
  new = "Tell me what 4 + 3 equals.\nEnd with \\boxed{} around the number."
  assert questions.count(new) == 6  # without the reasoning
  rows = read_lines(folder / "so" / "samples")
  assert len(rows) == 60 and rows[24]["prompt"] == new
  about = [{"prompt": f"{row['id']} + 3", "answer": row["id"] + 3} for row in rows]
  assert [row["about"] for row in rows] == about


def test_votes_become_label_smoothing(made):
  """`record` reads the kept samples; label smoothing is 1 - agreement."""
  folder, c, _ = made
  rows = kept(c, folder / "so", vote=config.filter("votes"), right=config.filter("math"))
  votes = {}
  for row in read_lines(folder / "so" / "samples"):
    votes.setdefault(row["id"], []).append(f"{{{row['about']['answer']}}}" in row["text"])
  want = [np.mean(v) for v in votes.values() if np.mean(v) > 0.5 for _ in range(sum(v))]
  assert [row["agreement"] for row in rows] == want and len(set(want)) > 1

  c.data.kind, c.data.path, c.records.kind = "chat", str(folder / "so" / "kept"), "text"
  c.data.trust, c.data.sequences, c.data.seq_len = "agreement", 0, 128
  record(config.resolve(c), folder / "chats")
  store, tokenizer = open_store(folder / "chats"), load_tokenizer(c.data.tokenizer)
  assert store.manifest.smoothing
  got = []
  for i in range(len(store)):
    row = store[i]
    for s in range(1, row["segments_T"].max() + 1):
      at = row["segments_T"] == s
      (smoothing,) = set(row["smoothing_T"][at].tolist())
      got.append((tokenizer.decode(row["tokens_T"][at].tolist()), smoothing))
    assert not row["smoothing_T"][row["segments_T"] == 0].any()
  assert [text for text, _ in got] == [f"{r['prompt']}\n{r['text']}\n" for r in rows]
  np.testing.assert_allclose([s for _, s in got], 1 - np.array(want), atol=1e-3)

  c.losses = {"hard": config.loss("ce")}
  c.train.records, c.train.steps = (str(folder / "chats"),), 2
  resolved = config.resolve(c)
  with Workdir(folder / "run", resolved) as path:
    training.train(resolved, path)
  first = tiny.measured(folder / "run")[0]
  assert first["hard"] != first["ce"] and first["loss"] == pytest.approx(first["hard"])

  c.data.trust = "confidence"
  with pytest.raises(InputError, match="Field 'confidence' is None; expected a number"):
    record(config.resolve(c), folder / "other")
  c.data.trust = ""
  record(config.resolve(c), folder / "plain")
  both = [open_store(folder / "plain"), store]
  batch = next(loader.batches(both, batch_size=8, seed=0, mixture=(0.5, 0.5)))
  smoothed = (batch.smoothing_BT > 0).any(1)
  assert 0 < smoothed.sum() < 8  # rows of a store without smoothing are not smoothed


def test_pseudo_labels_are_kept_if_the_teacher_is_confident(tmp_path):
  c = tiny.tiny(tmp_path)
  texts = tmp_path / "texts.txt"
  texts.write_text("a fine film\na film\nfine\n")
  with Server(answer=teacher) as server:
    c.generate.server.urls, c.generate.chat = (server.url,), True
    c.generate.server.top_logprobs = 1
    fields = {"prompts": str(texts), "template": "Is it good or bad? {prompt}"}
    asked(c, tmp_path / "w", **fields)
  sure = config.filter("pseudo_label", labels=("good", "bad"), confidence=0.8)
  rows = kept(c, tmp_path / "w", sure=sure)
  assert [(r["prompt"][19:], r["label"]) for r in rows] == [
    ("a fine film", "good"),
    ("fine", "good"),
  ]
  assert [r["confidence"] for r in rows] == pytest.approx([0.875] * 2)
  (other,) = read_lines(tmp_path / "w/rejected/00000.jsonl")
  assert other["rejected"]["why"] == "low confidence" and other["confidence"] == pytest.approx(0.5)


@pytest.mark.parametrize("template", ["no place", "{ prompt }"])
def test_a_template_without_a_placeholder_is_an_error(tmp_path, template):
  c = tiny.tiny(tmp_path)
  c.generate.prompts = c.data.path
  c.generate.server.urls = ("http://localhost:1/v1",)
  with pytest.raises(InputError, match="expected a template that contains {prompt}"):
    asked(c, tmp_path / "w", template=template)


def test_compressed_prompts_are_refused(tmp_path):
  """`on_policy` reads prompts by their places in the file."""
  c = tiny.tiny(tmp_path)
  c.generate.prompts = "prompts.jsonl.gz"
  c.generate.server.urls = ("http://localhost:1/v1",)
  with pytest.raises(InputError, match="generate.prompts is 'prompts.jsonl.gz'; expected files"):
    asked(c, tmp_path / "w")
  c.generate.prompts = str(tmp_path / "prompts")
  for name in ("a.jsonl", "b.jsonl.gz"):
    (tmp_path / "prompts").mkdir(exist_ok=True)
    (tmp_path / "prompts" / name).write_text("")
  with pytest.raises(InputError, match="generate.prompts is 'b.jsonl.gz'; expected files"):
    asked(c, tmp_path / "v")


def test_smoothed_labels_and_their_gradient():
  """They equal cross-entropy with the smoothed distribution; masked positions may be NaN."""
  B, T, D, V, rows = 2, 6, 4, 11, 13
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=(B, T, D)), rng.normal(size=(rows, D))
  labels, mask = rng.integers(0, V, (B, T)), rng.random((B, T)) < 0.7
  own, whole = rng.random((B, T)), 0.1
  target = np.zeros((B, T, V))
  np.put_along_axis(target, labels[..., None], ((1 - whole) * (1 - own))[..., None], -1)
  target += (1 - target.sum(-1, keepdims=True)) / V
  z = x @ w[:V].T
  logq = z - np.log(np.exp(z).sum(-1, keepdims=True))
  want = -(target * logq).sum(-1)[mask].sum()
  dz = (np.exp(logq) - target) * mask[..., None]

  f32 = lambda a: jnp.asarray(a, jnp.float32)
  smoothing = f32(np.where(mask, own, np.nan))
  inputs = Inputs(*(jnp.zeros((B, T), jnp.int32),) * 3)
  batch = Batch(inputs, jnp.asarray(labels), jnp.asarray(mask), {}, smoothing)
  fn = ce.Loss(label_smoothing=whole)

  def total(x, w):
    one = lambda z, piece: (
      jnp.sum(jnp.where(piece.mask_BT, fn.token_loss(z, piece, jnp.int32(0)), 0)),
      {},
    )
    return fused_head.loss(one, x, w, batch, chunk=4, vocab_size=V)[0]

  got, (dx, dw) = jax.jit(jax.value_and_grad(total, (0, 1)))(f32(x), f32(w))
  np.testing.assert_allclose(got, want, rtol=1e-5)
  np.testing.assert_allclose(dx, dz @ w[:V], atol=1e-5)
  np.testing.assert_allclose(dw[:V], np.einsum("BTV,BTD->VD", dz, x), atol=1e-5)
  assert not dw[V:].any()


def test_encoding_of_smoothing():
  segments = np.array([1, 1, 2, 3, 3, 0, 0], np.int32)
  x = np.array([0.5, 0.5, 0, 0.25, 0.25, 9, 9], np.float32)
  data = token_codec.encode_smoothing({"segments_T": segments, "smoothing_T": x})
  assert len(data) == 6
  np.testing.assert_array_equal(token_codec.decode_smoothing(data, segments), [*x[:5], 0, 0])
  np.testing.assert_array_equal(token_codec.decode_smoothing(data[:4], np.array([1, 2])), [0.5, 0])
  for bad, match in ((x + np.arange(7), "differs within"), (x + 1, "from 1.0 to 1.5")):
    with pytest.raises(InputError, match=match):
      token_codec.encode_smoothing({"segments_T": segments, "smoothing_T": bad.astype(np.float32)})
  with pytest.raises(InputError, match="bytes of smoothing"):
    token_codec.decode_smoothing(data, np.array([1, 2]))
