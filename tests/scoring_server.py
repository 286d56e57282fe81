"""A small vLLM or SGLang server that scores given tokens, and misbehaves on demand.

Its model has a distribution for every context, made from the last three tokens, so that tests
compute the right answers themselves with `logp`.
"""

import base64
import functools
import io
import math

import bad_server
import numpy as np

VOCAB = 256
MAX_LOGPROBS = 20
# Faults of a server that is not quite right; others are those of bad_server.
DAMAGES = ("short", "other tokens", "no label", "none", "nan", "positive", "impossible", "heavy")


def logp(context, vocab=VOCAB, seed=0):
  """The log-probabilities of the next token, float64 [vocab]."""
  return _logp(tuple(int(t) for t in context[-3:]), vocab, seed)


@functools.cache
def _logp(context, vocab, seed):
  draw = np.random.default_rng([seed, *context])
  logits = 2.5 * draw.standard_normal(VOCAB)[:vocab]
  return logits - np.log(np.exp(logits).sum())


class Server(bad_server.Server):
  """The server; see bad_server.Server for its attributes.

  Args:
    kind: "vllm" or "sglang".
    has_token_ids: True for a vLLM with /inference/v1/generate.
    encode: Returns the tokens of a text, as the server tokenizes it.
    render: Returns the tokens of messages; None for a server without a chat template.
    max_len: The maximum number of tokens of a text and what is sampled.
    seed: The seed of the model.
    noise: Size of random changes of log-probabilities, other ones in each response.
    change: Changes the JSON of a response before it is sent.
  """

  def __init__(
    self,
    kind="vllm",
    *,
    has_token_ids=False,
    encode=None,
    render=None,
    max_len=1024,
    vocab=VOCAB,
    seed=0,
    noise=0.0,
    change=None,
    **kwargs,
  ):
    super().__init__(kind, **kwargs)
    self.RequestHandlerClass = Handler
    self.has_token_ids, self.encode, self.render = has_token_ids, encode, render
    self.max_len, self.vocab, self.seed, self.noise = max_len, vocab, seed, noise
    self.change = change or (lambda answer: answer)
    self.random = np.random.default_rng(1)

  def rows(self, tokens):
    """The log-probabilities at each token of a text but the first."""
    out = []
    for i in range(1, len(tokens)):
      logps = logp(tokens[:i], self.vocab, self.seed)
      if self.noise:
        logps = logps + self.noise * self.random.standard_normal(self.vocab)
        logps -= np.log(np.exp(logps).sum())
      out.append(logps)
    return out


class Handler(bad_server.Handler):
  server: Server

  def do_GET(self):
    if self._let_in():
      s = self.server
      card = {"id": s.model, "owned_by": s.owner, "max_model_len": s.max_len}
      self._send(200, {"data": [card]}, no=not s.owner)

  def _prompt_and_seed(self, body):
    return tuple(self._tokens(body) or ()), 0

  def _respond(self, body, fault):
    if fault and fault not in DAMAGES:
      self._fault(fault, body)
    else:
      self._score(body, self._tokens(body), fault)

  def _tokens(self, body):
    prompt = body.get("prompt", body.get("token_ids", body.get("input_ids", body.get("text"))))
    if "messages" in body:
      return self.server.render(body["messages"]) if self.server.render else None
    return self.server.encode(prompt) if isinstance(prompt, str) else prompt

  def _score(self, body, tokens, fault):
    s = self.server
    if self.path == "/v1/chat/completions":
      self._chat(tokens)
      return
    if (why := self._refusal(body, tokens)) or self.path not in self._paths():
      self._send(400, {"error": {"message": why, "code": 400}}, no=not why)
      return
    answer = {
      "/v1/completions": self._vllm,
      "/inference/v1/generate": self._token_ids,
      "/generate": self._sglang,
    }[self.path](body, tokens)
    self._send(200, s.change(damaged(answer, fault)))

  def _paths(self):
    if self.server.owner == "sglang":
      return ("/generate",)
    return ("/v1/completions", *(["/inference/v1/generate"] * self.server.has_token_ids))

  def _refusal(self, body, tokens):
    s = self.server
    if body.get("prompt_logprobs", body.get("top_logprobs_num", 0)) > MAX_LOGPROBS:
      return "Requested prompt logprobs is greater than max allowed: 20"
    if max(tokens) >= s.vocab:
      return f"Token id {max(tokens)} is out of vocabulary"
    if len(tokens) + 1 > s.max_len:
      return f"This model's maximum context length is {s.max_len} tokens."
    if body.get("prompt_logprobs") and body.get("stream"):
      return "`prompt_logprobs` are not available when `stream=True`."
    return ""

  def _chat(self, tokens):
    if tokens is None:
      self._send(400, {"error": {"message": "no chat template", "code": 400}})
      return
    answer = {"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": len(tokens)}}
    self._send(200, answer | ({"prompt_token_ids": tokens} if self.server.owner == "vllm" else {}))

  def _vllm(self, body, tokens):
    k, logprobs = body["prompt_logprobs"], [None]
    for token, row in zip(tokens[1:], self.server.rows(tokens), strict=True):
      ids = dict.fromkeys([token, *np.argsort(-row)[:k].tolist()])
      logprobs.append({str(i): {"logprob": row[i], "rank": 1, "decoded_token": "?"} for i in ids})
    choice = {"text": "x", "finish_reason": "length", "prompt_logprobs": logprobs}
    if body["return_token_ids"]:
      choice["prompt_token_ids"] = tokens
    return {"choices": [choice]}

  def _token_ids(self, body, tokens):
    chosen = body["sampling_params"]
    ids, first = chosen["prompt_logprob_token_ids"], chosen["prompt_logprob_start"] + 1
    rows = self.server.rows(tokens)[first - 1 :]
    scores = np.array([row[i] for row, i in zip(rows, ids, strict=True)], np.float32)
    raw = io.BytesIO()
    np.save(raw, scores)
    return {"prompt_token_id_logprobs": base64.b64encode(raw.getvalue()).decode()}

  def _sglang(self, body, tokens):
    start, k = body["logprob_start_len"], body["top_logprobs_num"]
    rows = [None, *self.server.rows(tokens)]
    own, top = [[None, tokens[start], None]], [None]
    for token, row in zip(tokens[start + 1 :], rows[start + 1 :], strict=True):
      written = token if token < self.server.vocab - 1 else 0  # SGLang clips the last id
      own.append([row[token], written, None])
      top.append([[row[i], int(i), None] for i in np.argsort(-row)[:k]])
    info = {"input_token_logprobs": own, "input_top_logprobs": top}
    return {"text": "", "meta_info": info | {"output_token_logprobs": [[-1.0, 5, None]]}}


def damaged(answer, fault):
  """A response with one of DAMAGES; "": without."""
  if not fault:
    return answer
  logprobs = answer["choices"][0]["prompt_logprobs"]
  entries = logprobs[-1]
  if fault == "short":
    del logprobs[-1]
  elif fault == "other tokens":
    answer["choices"][0]["prompt_token_ids"][0] += 1
  elif fault == "no label":
    logprobs[-1] = {"999999": {"logprob": -1.0}}
  elif fault == "none":
    logprobs[-1] = None
  else:
    number = {"nan": math.nan, "positive": 0.5, "impossible": -9999.0, "heavy": -1e-4}[fault]
    for entry in entries.values():
      entry["logprob"] = number
  return answer
