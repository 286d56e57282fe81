"""The adapter for lm-evaluation-harness gives the results of transformers and lm-eval."""

import importlib
import importlib.util
import json
import sys
import types

import parity
import pytest
import tiny
import torch
import transformers
from tokenizers import Tokenizer

from distill_jax.errors import InputError

INSTALLED = importlib.util.find_spec("lm_eval") is not None
LONGEST = 64
TEXTS = ["three times six is eighteen", "x", "a longer text, " * 12, ""]
PAIRS = [
  ("three times six is", " eighteen"),
  ("a longer text, " * 6, "and its end"),
  ("", "a beginning"),
  ("ends with a space ", "and continues"),
  ("one", "o"),
]
PROMPTS = [
  ("three times six is", {"until": ["\n"], "max_gen_toks": 12}),
  ("hello", {"until": ["\n"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}),
  ("a longer text, " * 6, {"until": ["\n"], "max_gen_toks": 12}),
]


class Request:
  def __init__(self, *args):
    self.args = args


@pytest.fixture(scope="module")
def api():
  """Returns the adapter's module, with a substitute for lm-eval if it is not installed."""
  patch = pytest.MonkeyPatch()
  if not INSTALLED:

    class LM:
      def __init__(self):
        self.cache_hook = types.SimpleNamespace(add_partial=lambda *_: None)

    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
      patch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["lm_eval.api.model"].LM = LM
  patch.delitem(sys.modules, "distill_jax.evals.lm_eval", raising=False)
  yield importlib.import_module("distill_jax.evals.lm_eval")
  patch.delitem(sys.modules, "distill_jax.evals.lm_eval", raising=False)
  patch.undo()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("lm_eval")
  parity.torch_model("llama", vocab_size=257, max_position_embeddings=LONGEST).save_pretrained(
    folder
  )
  tokenizer = Tokenizer.from_file(str(tiny.write_tokenizer(folder / "tokenizer.json")))
  tokenizer.add_special_tokens(["<s>"])
  tokenizer.save(str(folder / "tokenizer.json"))
  template = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
  )
  tokenizer_config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "#",
    "model_max_length": LONGEST,
    "chat_template": template,
  }
  (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
  return folder


@pytest.fixture(scope="module")
def ours(api, folder):
  return api.Adapter(str(folder), batch_size=4)


@pytest.fixture(scope="module")
def torch_model(folder):
  return transformers.AutoModelForCausalLM.from_pretrained(folder)


def logp(model, ids, n):
  """Returns the log-likelihood of the last n tokens, and True if greedy decoding gives them."""
  with torch.no_grad():
    z = torch.log_softmax(model(torch.tensor([ids[:-1]])).logits[0].double(), -1)[-n:]
  scored = torch.tensor(ids[-n:])
  return float(z[torch.arange(n), scored].sum()), bool((z.argmax(-1) == scored).all())


def test_rolling_windows(api):
  ids = list(range(10))
  got = list(api.rolling(ids, [99], 4))  # the example in lm-eval's docstring
  assert got == [([99], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]
  assert list(api.rolling([], [99], 4)) == [] and list(api.rolling([1], [99], 4)) == [([99], [1])]


def test_likelihoods_equal_those_of_transformers(ours, torch_model, capsys):
  encode = ours.tokens.encode
  got = ours.loglikelihood([Request(*pair) for pair in PAIRS])
  assert "1 texts are longer than 64 tokens. Their beginnings are cut." in capsys.readouterr().err
  for (given, scored), (total, greedy) in zip(PAIRS, got, strict=True):
    ids, n = encode(given + scored), len(encode(scored)) + given.endswith(" ")
    want = logp(torch_model, ([256, *ids] if not given else ids)[-LONGEST - 1 :], n)
    assert total == pytest.approx(want[0], rel=2e-5) and greedy == want[1]
  requests = [Request(text) for text in TEXTS]
  for text, total in zip(TEXTS, ours.loglikelihood_rolling(requests), strict=True):
    ids = [256, *encode(text)]
    starts = range(0, len(ids) - 1, LONGEST)
    ends = [min(at + LONGEST, len(ids) - 1) for at in starts]
    pieces = zip(starts, ends, strict=True)
    want = sum(logp(torch_model, ids[max(0, e - LONGEST) : e + 1], e - a)[0] for a, e in pieces)
    assert total == pytest.approx(want, rel=2e-5)


@pytest.fixture(scope="module")
def continuations(ours):
  return ours.generate_until([Request(*prompt) for prompt in PROMPTS])


def test_continuations_equal_those_of_transformers(ours, torch_model, continuations):
  for (text, settings), got in zip(PROMPTS, continuations, strict=True):
    ids = torch.tensor([ours.tokens.encode(text)[-(LONGEST - 12) :]])
    out = torch_model.generate(
      ids,
      max_new_tokens=settings["max_gen_toks"],
      do_sample=False,
      attention_mask=torch.ones_like(ids),
      eos_token_id=2,
    )
    want = out[0, ids.shape[1] :].tolist()
    want = want[: want.index(2)] if 2 in want else want
    assert got == ours.tokens.decode(want).partition("\n")[0]


def test_stop_strings_and_chat_templates(ours, continuations):
  whole = continuations[1]
  (cut,) = ours.generate_until([Request("hello", {"until": whole[4], "max_gen_toks": 12})])
  assert cut == whole[: whole.index(whole[4])] and len(whole) > len(cut)
  hi = [{"role": "user", "content": "hi"}]
  assert ours.apply_chat_template(hi) == "[user]hi[assistant]"
  assert ours.apply_chat_template(hi, add_generation_prompt=False) == "[user]hi"
  assert "m.role" in ours.chat_template(True) and ours.chat_template(False) == ""


def test_invalid_requests_and_arguments_are_errors(ours, api, folder):
  with pytest.raises(InputError, match="setting 'num_beams', which is not supported"):
    ours.generate_until([Request("a", {"num_beams": 2})])
  with pytest.raises(InputError, match=r"max_gen_toks is 64; expected less than max_length \(64\)"):
    ours.generate_until([Request("a", {"max_gen_toks": 64})])
  with pytest.raises(InputError, match="max_length is 64; expected at least 70"):
    ours.loglikelihood([Request("a", "b" * 70)])
  with pytest.raises(InputError, match="max_length is 65; expected at most 64"):
    api.Adapter(str(folder), batch_size=4, max_length=65)
  with pytest.raises(InputError, match="batch_size is 3"):
    api.Adapter(str(folder), batch_size=3)


def test_a_missing_lm_eval_is_an_error(monkeypatch):
  monkeypatch.delitem(sys.modules, "distill_jax.evals.lm_eval", raising=False)
  monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
  with pytest.raises(InputError, match="pip install 'distill-jax\\[lm_eval\\]'"):
    importlib.import_module("distill_jax.evals.lm_eval")


@pytest.mark.skipif(
  not INSTALLED, reason="lm-eval is not installed: pip install 'distill-jax[lm_eval]'"
)
def test_results_equal_those_of_lm_evals_model(ours, folder, tmp_path):
  """lm-eval runs a task of each kind from a local file on both models."""
  import lm_eval
  from lm_eval.models.huggingface import HFLM
  from lm_eval.tasks import TaskManager

  rows = [
    {"q": q, "c": [a, " or not", " never"], "n": i % 3} for i, (q, a) in enumerate(PAIRS) if q
  ]
  data = tmp_path / "rows.json"
  data.write_text(json.dumps(rows))
  common = {
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(data)}},
    "test_split": "test",
    "doc_to_text": "{{q}}",
  }
  tasks = [
    common
    | {
      "task": "choose",
      "output_type": "multiple_choice",
      "doc_to_choice": "{{c}}",
      "doc_to_target": "{{n}}",
      "target_delimiter": "",
    },
    common
    | {
      "task": "generate",
      "output_type": "generate_until",
      "doc_to_target": "{{n}}",
      "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12},
    },
    common
    | {
      "task": "roll",
      "output_type": "loglikelihood_rolling",
      "doc_to_target": "{{q}}",
      "metric_list": [{"metric": "word_perplexity"}],
    },
  ]
  found = {}
  for name, model in (
    ("ours", ours),
    ("theirs", HFLM(pretrained=str(folder), device="cpu", max_length=LONGEST)),
  ):
    out = lm_eval.simple_evaluate(
      model=model,
      tasks=[dict(t) for t in tasks],
      log_samples=True,
      bootstrap_iters=0,
      task_manager=TaskManager(include_defaults=False),
    )
    found[name] = {n: [s["resps"] for s in samples] for n, samples in out["samples"].items()}
  assert found["ours"]["generate"] == found["theirs"]["generate"]
  for a, b in zip(found["ours"]["choose"], found["theirs"]["choose"], strict=True):
    assert [x[0][0] for x in a] == pytest.approx([x[0][0] for x in b], rel=1e-4)
    assert [x[0][1] for x in a] == [x[0][1] for x in b]
  first = lambda x: first(x[0]) if isinstance(x, list | tuple) else x
  assert [first(x) for x in found["ours"]["roll"]] == pytest.approx(
    [first(x) for x in found["theirs"]["roll"]], rel=1e-4
  )
