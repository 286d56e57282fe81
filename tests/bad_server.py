"""A small OpenAI-compatible server that counts requests and produces faults on demand."""

from __future__ import annotations

import collections
import contextlib
import email.utils
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-a-key-that-must-not-leak"
LONG = "This model's maximum context length is 64 tokens, and you asked for 99."


class Server(ThreadingHTTPServer):
  """A server that runs in a thread; a context manager.

  Args:
    owner: The owner of its model. "": it does not list its models.
    key: The API key that requests must have. None: no key.
    answer: Returns the JSON of a response, given a request's body. None: `plain`.
    streams: False for a server that ignores `stream`.

  Attributes:
    faults: The faults of a prompt's next requests, by prompt. With `forever`, the first one stays.
    forever: See `faults`.
    asked: The (time, prompt, seed) of each request for a sample.
    bodies: The JSON of each of these requests.
    paths: The path of each of these requests.
    answered: The number of complete responses, by (prompt, seed).
    most: The maximum number of concurrent requests.
    refused: The number of requests with a wrong key.
    together: A barrier at which requests for samples wait for each other. None: no barrier.
  """

  daemon_threads = True
  request_queue_size = 64

  def __init__(self, owner="somebody", key=None, answer=None, streams=True, port=0):
    super().__init__(("127.0.0.1", port), Handler)
    self.owner, self.key, self.make, self.streams = owner, key, answer or plain, streams
    self.together: threading.Barrier | None = None
    self.faults: dict[str, list[str]] = collections.defaultdict(list)
    self.forever, self.model = False, "big"
    self.asked: list[tuple[float, str, int]] = []
    self.bodies: list[dict[str, Any]] = []
    self.paths: list[str] = []
    self.answered: collections.Counter = collections.Counter()
    self.now = self.most = self.refused = 0
    self.lock = threading.Lock()

  @property
  def url(self) -> str:
    return f"http://127.0.0.1:{self.server_address[1]}/v1"

  def handle_error(self, *_):
    pass  # a client was killed and closed its connection

  def __enter__(self):
    threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return self

  def __exit__(self, *_):
    self.shutdown()
    self.server_close()


def text_of(body: dict[str, Any]) -> str:
  return body["prompt"] if "prompt" in body else body["messages"][-1]["content"]


def plain(body: dict[str, Any]) -> dict[str, Any]:
  """Returns a response whose text is a function of prompt and seed."""
  text = f"{text_of(body)} -> {body['seed']} \u00e9"
  inner = {"text": text} if "prompt" in body else {"message": {"content": text}}
  return {
    "id": "x",
    "choices": [{"finish_reason": "stop", **inner}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 7},
  }


def events(answer: dict[str, Any]) -> list[dict[str, Any]]:
  """Returns the events of a streamed response: one per three characters or token, then the end."""
  (choice,) = answer["choices"]
  choice = dict(choice)
  logprobs, ids = choice.pop("logprobs", None) or {}, choice.pop("token_ids", None) or []
  fields = choice.pop("message", None) or {"text": choice.pop("text")}
  kind = (lambda part: part) if "text" in fields else (lambda part: {"delta": part})
  parts = [
    {key: text[i : i + 3]}
    for key, text in fields.items()
    if text is not None
    for i in range(0, len(text), 3)
  ]
  lists = {"logprobs": logprobs, "token_ids": ids}
  count = max([len(parts), len(ids), *map(len, logprobs.values())])
  rest = {k: v for k, v in answer.items() if k not in ("choices", "usage")}
  out = []
  for i in range(count):
    one = kind(parts[i] if i < len(parts) else {}) | {"index": 0, "finish_reason": None}
    if logprobs:
      one["logprobs"] = {key: values[i : i + 1] for key, values in lists["logprobs"].items()}
    if ids:
      one["token_ids"] = ids[i : i + 1]
    out.append({**(rest if not i else {"id": answer.get("id")}), "choices": [one]})
  out.append({"choices": [kind({} if "text" not in fields else {"text": ""}) | choice]})
  return [*out, {"choices": [], "usage": answer.get("usage")}]


class Handler(BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  server: Server

  def log_message(self, *_):
    pass

  def do_GET(self):
    if self._let_in():
      owner = self.server.owner
      models = {"data": [{"id": self.server.model, "owned_by": owner}]} if owner else {}
      self._send(200, models, no=not owner)

  def do_POST(self):
    s = self.server
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    if not self._let_in():
      return
    prompt, seed = self._prompt_and_seed(body)
    with s.lock:
      s.asked.append((time.monotonic(), prompt, seed))
      s.bodies.append(body)
      s.paths.append(self.path)
      s.now += 1
      s.most = max(s.most, s.now)
      todo = s.faults[prompt]
      fault = (todo[0] if s.forever else todo.pop(0)) if todo else ""
    try:
      if s.together:
        s.together.wait(60)
      self._respond(body, fault)
    finally:
      with s.lock:
        s.now -= 1

  def _prompt_and_seed(self, body) -> tuple[Any, int]:
    return text_of(body), body["seed"]

  def _respond(self, body, fault: str):
    self._fault(fault, body) if fault else self._answer(body)

  def _answer(self, body):
    self.server.answered[text_of(body), body["seed"]] += 1
    answer = self.server.make(body)
    if body.get("stream") and self.server.streams:
      self._stream([json.dumps(event) for event in events(answer)] + ["[DONE]"])
    else:
      self._send(200, answer)

  def _stream(self, data: list[str], pause: float = 0.0):
    """Sends events; the connection stays usable only after the last one, "[DONE]"."""
    with contextlib.suppress(OSError):
      self.send_response(200)
      self.send_header("Content-Type", "text/event-stream; charset=utf-8")
      self.send_header("Transfer-Encoding", "chunked")
      self.end_headers()
      for one in data:
        raw = f": ping\n\ndata: {one}\n\n".encode()
        self.wfile.write(f"{len(raw):x}\r\n".encode() + raw + b"\r\n")
        self.wfile.flush()
        time.sleep(pause)
      if data[-1] == "[DONE]":
        self.wfile.write(b"0\r\n\r\n")

  def _let_in(self) -> bool:
    if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
      self.server.refused += 1
      self._send(401, {"error": f"wrong key {self.headers['Authorization']}"})
      return False
    return True

  def _fault(self, fault: str, body):
    if fault.startswith("429 "):
      after = fault.removeprefix("429 ")
      if after == "date":
        after = email.utils.formatdate(time.time() + 2, usegmt=True)
      self._send(429, {"error": "too fast"}, {"Retry-After": after})
    elif fault.isdigit():
      echo = f"out of order, {self.headers['Authorization']}"
      self._send(int(fault), {"error": LONG if fault == "400" else echo})
    elif fault == "close":
      self.close_connection = True
    elif fault in ("cut", "truncated"):
      whole = json.dumps(plain({"prompt": "no", "seed": 0})).encode()
      half = whole[: len(whole) // 2]
      self._raw(200, half, len(whole) if fault == "cut" else len(half))
      self.close_connection = True
    elif fault == "silent":
      self._wait_for_the_end()
    elif fault == "drip":
      self.send_response(200)
      self.send_header("Content-Length", "1000")
      self.end_headers()
      with contextlib.suppress(OSError):
        for _ in range(40):
          self.wfile.write(b" ")
          time.sleep(0.05)
      self.close_connection = True
    elif fault in ("stalls", "breaks off"):
      some = [json.dumps(event) for event in events(plain({"prompt": "no", "seed": 0}))][:2]
      self._stream(some)
      if fault == "stalls":
        self._wait_for_the_end()
      self.close_connection = True
    elif fault == "slow":
      self._stream([json.dumps(e) for e in events(self.server.make(body))] + ["[DONE]"], 0.1)
    elif fault == "engine died":
      self._stream([json.dumps({"error": {"message": "EngineDeadError", "code": 500}}), "[DONE]"])
    elif fault == "half":
      answer = plain({"prompt": "no", "seed": 0})
      answer["choices"][0]["text"] = "\ud83d"
      self._send(200, answer)
    elif fault == "abort":
      self._send(200, {"choices": [{"text": "no", "finish_reason": "abort"}]})
    elif fault == "filter":
      self._send(200, {"choices": [{"text": "no", "finish_reason": "content_filter"}]})
    else:
      self._send(200, {"error": fault})

  def _wait_for_the_end(self):
    with contextlib.suppress(OSError):
      self.connection.settimeout(300)
      self.connection.recv(1)  # wait until the client closes the connection
    self.close_connection = True

  def _send(self, status: int, tree: Any, headers: dict[str, str] | None = None, no: bool = False):
    raw = json.dumps(tree).encode()
    self._raw(404 if no else status, raw, len(raw), headers or {})

  def _raw(self, status: int, raw: bytes, length: int, headers: dict[str, str] | None = None):
    with contextlib.suppress(OSError):
      self.send_response(status)
      for name, value in {"Content-Length": str(length), **(headers or {})}.items():
        self.send_header(name, value)
      self.end_headers()
      self.wfile.write(raw)
