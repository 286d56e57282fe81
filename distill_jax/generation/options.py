"""Config section `generate`: prompts, sampling, decoding, and the teacher's server."""

from __future__ import annotations

import dataclasses

from distill_jax.types import JsonObject


@dataclasses.dataclass(frozen=True)
class ServerOptions:
  """OpenAI-compatible servers that serve the teacher, such as vLLM or SGLang."""

  urls: tuple[str, ...] = ()
  """Addresses of servers of one model, e.g. ("http://localhost:8000/v1",). A request goes to the
  server with the fewest requests in flight. (): the teacher runs on the local devices."""
  model: str = ""
  """Name of the model on the servers. "": the only model that a server has."""
  api_key_env: str = ""
  """Name of the environment variable that contains the API key. "": no key is sent."""
  in_flight: int = 32
  """Maximum number of concurrent requests, to all servers together."""
  requests_per_minute: float = 0.0
  """Maximum number of requests per minute. 0: no limit."""
  silence_s: float = 120.0
  """Timeout of a response that has begun, in seconds without a byte. Responses are streamed."""
  first_byte_s: float = 1800.0
  """Timeout of the first byte of a response, in seconds. It is longer, because a request can wait
  in the server's queue, and servers that do not stream send nothing before the end."""
  timeout_s: float = 0.0
  """Timeout of a whole response, in seconds. 0: none."""
  retries: int = 8
  """Maximum number of retries of a request. The waits between them grow exponentially. A timeout is
  retried once."""
  top_logprobs: int = 0
  """Number of log-probabilities per token to request. They are stored in the folder responses,
  which `record` can read. 0: none."""
  max_disagreement: float = 0.05
  """Maximum mean difference between the log-probabilities that servers give to one text in two
  requests, in nats per token, before `record` and `on_policy` let them score texts. Servers that
  compute in bfloat16 differ by about 0.01."""
  extra: JsonObject = dataclasses.field(default_factory=dict)
  """Additional fields of each request's JSON body. A field set to None is removed from the body."""


@dataclasses.dataclass(frozen=True)
class DecodingOptions:
  """Settings for decoding with a local model: the cache and the batches.

  Apart from `cache_len` and `cache_dtype`, these keys do not change the generated texts. `evaluate`
  decodes its benchmarks with the same keys.
  """

  cache_len: int = 1024
  """Maximum length of a prompt and its completion together, in tokens."""
  cache_dtype: str = ""
  """Dtype of the KV cache: "int8", or "" for the compute dtype. "int8" changes outputs slightly."""
  batch_size: int = 32
  """Number of sequences that are decoded at once. It is rounded up to a multiple of the number of
  devices on the mesh axes data and fsdp. `preflight --verb=generate` prints how many fit."""
  prefill_rows: int = 4
  """Number of prompts that are prefilled at once, rounded up like `batch_size`."""
  prefill_chunk: int = 64
  """Number of tokens of each prompt that one prefill call processes."""
  steps: int = 8
  """Number of tokens that one decode call generates per sequence. Stop strings are checked after
  each call."""
  gather: str = "auto"
  """Time at which weights that are spread over the mesh axis fsdp are gathered: "once", before the
  first token; "per_token", which needs less memory and is slow; or "auto": once if weights and
  caches take at most 90% of the memory that the devices report, otherwise per token, with a line on
  stderr."""


@dataclasses.dataclass(frozen=True)
class GenerateOptions(DecodingOptions):
  """The prompts of the command `generate`, and how the teacher's completions are sampled.

  `evaluate` uses these keys of this section too: `chat`, `stop` (for benchmarks without their own),
  `repetition`, `server` (for the teacher) and all of `DecodingOptions`.
  """

  prompts: str = ""
  """Path or URL of the prompts: a .jsonl file with one JSON object per line, a text file with one
  prompt per line, or a folder of .jsonl or .txt files."""
  field: str = "prompt"
  """Field of the JSON objects with the prompt: text or a list of chat messages. Set to "text" to
  use a filtered sample's completion as the next prompt; its answer key is carried over."""
  template: str = ""
  """Template applied to the prompt (or to its last message); must contain {prompt}. Example:
  "Rephrase and keep all numbers:\\n{prompt}". "": prompts are used unchanged."""
  chat: bool = False
  """True if a text prompt is a user's message, to be rendered by the chat template; False if the
  model continues the text itself."""
  samples: int = 1
  """Number of samples per prompt."""
  max_new_tokens: int = 256
  """Maximum number of generated tokens per sample."""
  on_bad: str = "stop"
  """Action at a prompt that cannot be used: "stop" (raise an error) or "skip" (skip and count
  it)."""
  temperature: float = 1.0
  """Sampling temperature. 0: greedy decoding."""
  top_k: int = 0
  """Number of most likely tokens to sample from. 0: all."""
  top_p: float = 1.0
  """Probability mass of the nucleus to sample from, in (0, 1]. 1: all tokens."""
  min_p: float = 0.0
  """Minimum probability of a token relative to the most likely one, in [0, 1]. 0: no minimum."""
  stop: tuple[str, ...] = ()
  """Stop strings. A text ends before the first of them."""
  repetition: int = 0
  """Length of a loop, in tokens: a text ends once its last N tokens are one sequence repeated at
  least 4 times. 0: off."""
  ignore_eos: bool = False
  """True to generate past the end-of-text tokens."""
  records_dir: str = ""
  """Folder or URL of a store that receives the samples, with the teacher's distributions recorded
  as set in `records`. "": none."""
  server: ServerOptions = ServerOptions()
  """Servers that run the teacher."""
