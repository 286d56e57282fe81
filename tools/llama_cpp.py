"""llama.cpp as tests and benchmarks use it: the prebuilt library in the npm package node-llama-cpp.

  npm i -E node-llama-cpp@3.21.1 --ignore-scripts   # 730 MB, in any folder; needs node 20
  export DISTILL_JAX_LLAMA_CPP=FOLDER

  runtime = LlamaCpp()
  logprobs_TV = runtime.logprobs("model.gguf", tokens)

Every call starts a process (about a second, plus the time in which the model is loaded), so give it
all texts at once. It computes on the CPU. Of the package's binaries only @node-llama-cpp/linux-x64
(29 MB) is used; the others can be deleted.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

VARIABLE = "DISTILL_JAX_LLAMA_CPP"
SCRIPT = Path(__file__).with_suffix(".mjs")
TIMEOUT = 1800  # seconds that a call may take


class Vocabulary(NamedTuple):
  """The vocabulary of a file as llama.cpp reads it.

  Attributes:
    size: The number of tokens.
    bos: The id of the token at the beginning of a text; None without one. `eos` and `eot` likewise.
    eos: The id of the token at the end of a text.
    eot: The id of the token at the end of a turn.
    end: The ids of all tokens at which the generation stops.
    begins_with_bos: Whether llama.cpp inserts `bos` at the beginning of a prompt. `texts` lack it.
    texts: The ids of every text.
  """

  size: int
  bos: int | None
  eos: int | None
  eot: int | None
  end: list[int]
  begins_with_bos: bool
  texts: list[list[int]]


def missing() -> str:
  """Returns the reason why llama.cpp cannot be used on this machine; "" if it can."""
  if not shutil.which("node"):
    return "node is not installed"
  if not (folder := os.environ.get(VARIABLE)):
    return f"{VARIABLE} does not name a folder with node-llama-cpp"
  if not Path(folder, "node_modules/node-llama-cpp/package.json").is_file():
    return f"{VARIABLE} is {folder!r}, in which node-llama-cpp is not installed"
  return ""


class Generation(NamedTuple):
  """The measurements of a generated sequence.

  Attributes:
    tokens_per_second: The rate, in seconds of processor time.
    memory_bytes: The memory of the process at the end, of which node has about 80 MB.
  """

  tokens_per_second: float
  memory_bytes: int


class LlamaCpp:
  """The runtime. Every method loads the GGUF file at `path` in a new process.

  Args:
    threads: The threads that compute. They wait for each other actively: two of them on two busy
      cores generated a tenth of the tokens of one.
    cache: The type of the key/value cache. llama.cpp's default is F16; F32 is exact.
  """

  def __init__(self, threads: int = 1, cache: str = "F32"):
    if fault := missing():
      raise RuntimeError(f"llama.cpp cannot be used: {fault}. See tools/llama_cpp.py.")
    self.threads, self.cache = threads, cache

  def vocabulary(
    self, path: str | os.PathLike, texts: Sequence[str] = (), special: bool = True
  ) -> Vocabulary:
    """Returns the vocabulary of a file and the ids of `texts`; no weights are read.

    Args:
      path: The GGUF file.
      texts: The texts to tokenize.
      special: Whether the names of control tokens in a text become these tokens.
    """
    response = self._call("vocabulary", path, texts=list(texts), special=special)
    return Vocabulary(**{key: response.get(key) for key in Vocabulary._fields})

  def tokenize(self, path: str | os.PathLike, text: str) -> list[int]:
    """Returns the ids of a text, without a bos token; `vocabulary` tokenizes several at once."""
    return self.vocabulary(path, [text]).texts[0]

  def logprobs(self, path: str | os.PathLike, tokens: Sequence[int]) -> np.ndarray:
    """Returns the log-probabilities of the token after each of `tokens`, float32 [T, V].

    llama.cpp gives probabilities in float32, which are normalised here, so a log-probability has
    an absolute error of 1e-6 more than the logits, and is -inf below about -103.
    """
    with tempfile.TemporaryDirectory() as out:
      shape = self._request(out, "logprobs", path, tokens=[int(t) for t in tokens])
      return np.fromfile(Path(out, "logprobs"), np.float32).reshape(shape["rows"], shape["size"])

  def greedy(self, path: str | os.PathLike, tokens: Sequence[int], n: int) -> list[int]:
    """Returns the `n` most probable tokens after `tokens`; an eos token does not end them."""
    return self._call("greedy", path, tokens=[int(t) for t in tokens], n=n)

  def generation(
    self, path: str | os.PathLike, prompt: Sequence[int], new: int, rounds: int = 3
  ) -> Generation:
    """Generates `new` tokens `rounds` times, and returns what the fastest time has taken.

    The time is that of the processor, so that other work on the machine changes it little: with one
    thread, it is the time on an idle machine. The first token is not timed, as the time of the
    prompt is in it.
    """
    tokens = [int(t) for t in prompt]
    response = self._call("speed", path, tokens=tokens, n=new, rounds=rounds)
    return Generation((new - 1) / min(response["seconds"]), response["memory"])

  @property
  def version(self) -> str:
    """The name of the runtime with the version of the package."""
    package = Path(os.environ[VARIABLE], "node_modules/node-llama-cpp/package.json")
    return f"llama.cpp (node-llama-cpp {json.loads(package.read_text())['version']})"

  def _call(self, action: str, path: str | os.PathLike, **options: Any) -> Any:
    with tempfile.TemporaryDirectory() as out:
      return self._request(out, action, path, **options)

  def _request(self, out: str, action: str, path: str | os.PathLike, **options: Any) -> Any:
    content = {"action": action, "path": str(Path(path).resolve()), **options}
    content |= {"threads": self.threads, "cache": self.cache}
    done = subprocess.run(
      ["node", str(SCRIPT), os.environ[VARIABLE], out],
      input=json.dumps(content),
      capture_output=True,
      text=True,
      timeout=TIMEOUT,
    )
    if done.returncode:
      raise RuntimeError(f"llama.cpp failed on {path}:\n{done.stderr[-4000:]}")
    return json.loads(Path(out, "response.json").read_bytes())
