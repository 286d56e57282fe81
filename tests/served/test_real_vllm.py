"""`record` with a real vLLM server, against the same teacher on the local devices."""

import asyncio
import json

import numpy as np
import pytest
import tiny
import tiny_transformers
import vllm_server
from json_lines import write_lines

from distill_jax import config
from distill_jax.commands import record
from distill_jax.data import corpus
from distill_jax.data.chat_template import ChatTemplate
from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.errors import InputError
from distill_jax.hub.pretrained import open_model
from distill_jax.records.store import open_store
from distill_jax.served import probes
from distill_jax.served.scoring_client import ScoringClient

pytestmark = [pytest.mark.slow, vllm_server.needed]
MAX_LEN, MAX_LOGPROBS, SEQ_LEN = 128, 24, 64


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """The folder of a random Llama whose distributions are not flat."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  folder = tmp_path_factory.mktemp("model")
  torch.manual_seed(0)
  shape = transformers.LlamaConfig(
    vocab_size=258,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    eos_token_id=256,
    initializer_range=0.15,
  )
  transformers.LlamaForCausalLM(shape).save_pretrained(folder)
  tiny_transformers.write_tokenizer(folder)
  return folder


@pytest.fixture(scope="module")
def url(model):
  """The address of a server of the model."""
  options = ["--max-model-len", str(MAX_LEN), "--max-logprobs", str(MAX_LOGPROBS)]
  with vllm_server.serving(model, "teacher", "float32", *options) as address:
    yield address


@pytest.fixture
def made(model, url, tmp_path):
  """A function that returns a config of 12 rows with several documents each."""

  def make(**changes):
    c = tiny.tiny(tmp_path)
    c.teacher.source, c.teacher.shape, c.data.tokenizer = str(model), "", ""
    lines = [{"text": f"{i} squared is {i * i}, and {i} is not."[: 20 + i % 20]} for i in range(40)]
    c.data.kind, c.data.path = "jsonl", str(write_lines(tmp_path / "text.jsonl", lines))
    c.data.seq_len, c.data.sequences, c.records.tokens_per_shard = SEQ_LEN, 12, 5 * SEQ_LEN
    c.records.kind, c.records.n = "topk", 8
    c.generate.server.urls, c.generate.server.in_flight = (url,), 4
    for name, value in changes.items():
      setattr(c.records, name, value)
    return c

  return make


def recorded(c, folder):
  record.run(config.resolve(c), folder)
  return open_store(folder)


def test_records_are_those_of_the_local_teacher(made, tmp_path):
  """The two computations differ in the order of float32 sums; float16 is stored to 1/2048."""
  here = recorded(made(), tmp_path / "here")
  there = recorded(made(served=True), tmp_path / "there")
  labels = recorded(made(served=True, kind="labels"), tmp_path / "labels")
  for i in range(len(here)):
    a, b, c = here[i], there[i], labels[i]
    mask = a["mask_T"]
    for name in ("tokens_T", "segments_T", "mask_T"):
      np.testing.assert_array_equal(a[name], b[name])
    np.testing.assert_allclose(a["label_logp_T"], b["label_logp_T"], rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(b["label_logp_T"], c["label_logp_T"])
    np.testing.assert_array_equal(a["argmax_T"][mask], b["argmax_T"][mask])
    np.testing.assert_array_equal(a["ids_TK"][mask], b["ids_TK"][mask])
    np.testing.assert_allclose(a["logp_TK"][mask], b["logp_TK"][mask], rtol=1e-3, atol=1e-3)


def test_what_the_server_refuses(made, tmp_path):
  with pytest.raises(InputError, match=r"refuses to give 40 log-prob.*Lower records\.n"):
    recorded(made(served=True, n=40), tmp_path / "n")
  c = made(served=True)
  c.data.seq_len, c.records.tokens_per_shard = MAX_LEN, 5 * MAX_LEN
  message = f"at most {MAX_LEN} tokens; expected at least {MAX_LEN + 1}"
  with pytest.raises(InputError, match=message):
    recorded(c, tmp_path / "long")
  c = made(served=True)
  other = tiny.write_tokenizer(tmp_path / "other.json")
  tree = json.loads(other.read_text())
  vocab = tree["model"]["vocab"]
  vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
  other.write_text(json.dumps(tree))
  c.data.tokenizer = str(other)
  with pytest.raises(InputError, match="Serve a teacher with the tokenizer of the texts"):
    recorded(c, tmp_path / "tokenizer")


def test_chat_templates(model, url, made):
  options = config.resolve(made()).generate.server
  pretrained = open_model(str(model))
  tokenizer = corpus.of_files(pretrained.tokenizer, "the model")
  template = ChatTemplate.of(pretrained.tokenizer, "the model")

  async def check(other):
    client = ScoringClient(options, 0, tokenizer.vocab_size, 0)
    async with client.http:
      await client.open()
      await probes.check_chat(client, tokenizer, other)

  asyncio.run(check(template))
  with pytest.raises(InputError, match="renders a chat as"):
    asyncio.run(check(ChatTemplate(template.source + "<think>", template.tokens, template.added)))
  assert load_tokenizer(str(model)).vocab_size == tokenizer.vocab_size
