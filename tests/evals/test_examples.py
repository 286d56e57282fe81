"""examples.json of `evaluate`, against dense float64 arithmetic and a model without a cache."""

import dataclasses
import json

import numpy as np
import pytest
import tiny

from distill_jax import config
from distill_jax.commands import evaluate
from distill_jax.data import corpus, token_bytes, tokenizers
from distill_jax.errors import InputError
from distill_jax.evals import side_by_side
from distill_jax.models import loading, runs
from distill_jax.records import collate
from distill_jax.records.store import open_store
from distill_jax.report import examples
from distill_jax.report.html_report import write_report
from distill_jax.types import Inputs


@pytest.fixture(scope="module")
def evaluated(tiny_run, tmp_path_factory):
  """(config, the examples, the models) of a run with the student of six steps."""
  c = tiny.tiny(tiny_run)
  c.evaluate.update(models={"distilled": f"run:{tiny_run / 'whole'}"}, batch_size=4, sequences=8)
  c.evaluate.examples = 2
  resolved = config.resolve(c)
  folder = tmp_path_factory.mktemp("examples")
  evaluate.run(resolved, folder)
  models = {}
  for name, options in evaluate.all_models(resolved).items():
    source = loading.open_source(options, resolved.seed)
    key = runs.keys(resolved.seed)["teacher" if name == "teacher" else "student"]
    models[name] = source.load(evaluate.sharding.make_mesh(), key)
  return resolved, examples.read(folder), models


def logp(model, tokens_T):
  """Returns the model's log-probabilities of every next token in float64, [T, V]."""
  tokens_BT = np.array([tokens_T], np.int32)
  out = model.model(Inputs.of(tokens_BT), model.compute)
  z = (np.float64(out.hidden_BTD) @ np.float64(out.head_VD).T)[0]
  return z - np.log(np.exp(z).sum(-1, keepdims=True))


def test_every_token_has_the_predictions_of_the_models(evaluated):
  c, found, models = evaluated
  data = dataclasses.replace(c.data, split="heldout", sequences=2)
  tokenizer = corpus.tokenizer_of(data, None)
  rows = list(corpus.sequences(data, tokenizer))
  assert len(found.texts) == 2 and all(len(text) == tiny.SEQ_LEN for text in found.texts)
  for row, text in zip(rows, found.texts, strict=True):
    tokens = row["tokens_T"].tolist()
    assert "".join(t.text for t in text) == tokenizer.decode(tokens)
    assert not text[0].predictions
    logs = {name: logp(models[name], tokens) for name in ("teacher", "distilled")}
    for i, token in enumerate(text[1:]):
      if not row["mask_T"][i]:
        assert not token.predictions
        continue
      assert set(token.predictions) == {"teacher", "distilled"}
      p = np.exp(logs["teacher"][i])
      for name, prediction in token.predictions.items():
        q = np.exp(logs[name][i])
        # Four digits are written; the models compute in float32.
        assert prediction.p == pytest.approx(q[tokens[i + 1]], rel=2e-3)
        assert [x for _, x in prediction.top] == pytest.approx(np.sort(q)[::-1][:5], rel=2e-3)
        kl = (p * (logs["teacher"][i] - logs[name][i])).sum()
        assert prediction.kl == pytest.approx(kl, rel=2e-3, abs=1e-6)
        best = tokenizer.decode([int(q.argmax())])
        assert prediction.top[0][0] == best


def test_generations_are_the_most_probable_tokens(evaluated):
  c, found, models = evaluated
  tokenizer = corpus.tokenizer_of(c.data, None)
  assert len(found.generations) == 1  # the text is one document
  (generation,) = found.generations
  assert generation.prompt == tiny.sentences()[0][: side_by_side.PROMPT_TOKENS]
  assert set(generation.texts) == {"teacher", "start", "distilled"}
  for name in ("teacher", "distilled"):
    prompt, new = (tokenizer.encode(x) for x in (generation.prompt, generation.texts[name]))
    assert len(new) == side_by_side.NEW_TOKENS
    logs = logp(models[name], [*prompt, *new])
    at = np.arange(len(prompt) - 1, len(prompt) + len(new) - 1)
    # The decoder's logits may break a near tie differently.
    assert (logs[at].max(-1) - logs[at, new]).max() < 1e-3


def test_a_recorded_teacher_is_shown_without_running_it(tiny_run, tmp_path, monkeypatch):
  c = tiny.tiny(tiny_run)
  c.teacher.source = "gone"
  c.train.heldout = (str(tiny_run / "records"),)
  c.evaluate.update(models={"distilled": f"run:{tiny_run / 'whole'}"}, heldout=False, examples=2)
  resolved = config.resolve(c)
  monkeypatch.setattr(evaluate.side_by_side, "generate", lambda _, models, mesh: [])
  evaluate.run(resolved, tmp_path)
  found = examples.read(tmp_path)
  assert found.samples == 15 and len(found.texts) == 2
  source = loading.open_source(evaluate.all_models(resolved)["distilled"], 0)
  student = source.load(evaluate.sharding.make_mesh(), runs.keys(0)["student"])
  store = open_store(tiny_run / "records")
  tokenizer = corpus.tokenizer_of(resolved.data, None)
  for i, text in enumerate(found.texts):
    batch = collate.collate([store[i]])
    p = batch.targets["teacher"]
    logq = logp(student, store[i]["tokens_T"])
    for t, token in enumerate(text[1:]):
      if not batch.mask_BT[0, t]:
        continue
      ids, weight = p.ids_BTK[0, t], p.weight_BTK[0, t]
      teacher = token.predictions["teacher"]
      assert [x for _, x in teacher.top] == pytest.approx(
        np.sort(weight[weight > 0])[::-1][:5], 1e-3
      )
      assert teacher.top[0][0] == tokenizer.decode([int(ids[weight.argmax()])])
      assert teacher.p == pytest.approx(np.exp(p.label_logp_BT[0, t]), rel=1e-3)
      kl = -np.float64(p.entropy_BT[0, t]) - (np.float64(weight) * logq[t, ids]).sum()
      assert token.predictions["distilled"].kl == pytest.approx(kl, rel=2e-3, abs=1e-4)
  write_report(tmp_path, runs={"distilled": tiny_run / "whole"})
  assert "estimated from 15 samples" in (tmp_path / "report.html").read_text()
  file = tiny.write_tokenizer(tmp_path / "tokenizer.json")
  cut = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
  file.write_text(json.dumps(json.loads(file.read_text()) | {"truncation": cut}))
  c.data.tokenizer = str(file)
  expected = r"was made with another tokenizer than .*set evaluate\.examples=0"
  with pytest.raises(InputError, match=expected):
    evaluate.run(config.resolve(c), tmp_path)


def test_prompts_of_a_file(tiny_run, tmp_path):
  c = tiny.tiny(tiny_run)
  c.evaluate.examples, c.evaluate.prompts = 2, str(tmp_path / "p.jsonl")
  resolved = config.resolve(c)
  tokenizer = corpus.tokenizer_of(resolved.data, None)
  lines = [{"prompt": "one"}, {"prompt": [{"role": "user", "content": "two"}]}, {}]
  (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
  read = lambda config: side_by_side._prompts(config, tokenizer, 80)
  assert read(resolved) == [lines[0]["prompt"], lines[1]["prompt"]]
  all_three = dataclasses.replace(resolved.evaluate, examples=3)
  with pytest.raises(
    InputError, match=r"p\.jsonl, line 3: .*no field 'prompt'.* Correct the prompt"
  ):
    read(dataclasses.replace(resolved, evaluate=all_three))
  (tmp_path / "p.jsonl").write_text("")
  with pytest.raises(InputError, match=r"p\.jsonl is empty"):
    read(resolved)
  c.evaluate.prompts = "gone.jsonl"
  with pytest.raises(InputError, match=r"evaluate\.prompts is 'gone\.jsonl'"):
    read(config.resolve(c))


@pytest.mark.smoke
def test_the_bytes_of_tokens(tmp_path):
  tokenizer = tokenizers.load_tokenizer(tiny.write_tokenizer(tmp_path / "tokenizer.json"))
  of = token_bytes.reader(tokenizer)
  text = "é 日本\n\t\x00 </s>"
  assert b"".join(map(of, tokenizer.encode(text))) == text.encode()
  assert sorted(map(of, range(256))) == [bytes([b]) for b in range(256)]
  assert of(300) == b""
