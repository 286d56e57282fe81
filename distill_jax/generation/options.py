"""Config section `generate`: what is sampled, how it is decoded, and from which server."""

from __future__ import annotations

import dataclasses

from distill_jax.types import JsonObject


@dataclasses.dataclass(frozen=True)
class ServerOptions:
  """An OpenAI-compatible server that serves the teacher, such as vLLM or SGLang."""

  url: str = ""  # such as http://localhost:8000/v1; "": the teacher runs here
  model: str = ""  # its name there; "": the only one that is served
  api_key_env: str = ""  # the environment variable that holds the key; "": no key
  in_flight: int = 32  # requests at once
  requests_per_minute: float = 0.0  # 0: no limit
  timeout_s: float = 600.0  # of one request
  retries: int = 8  # of a request, after waits that grow
  top_logprobs: int = 0  # of each token, kept in responses.jsonl for `record`; 0: none
  extra: JsonObject = dataclasses.field(default_factory=dict)  # more fields of a request


@dataclasses.dataclass(frozen=True)
class DecodingOptions:
  """How texts are decoded here. They do not depend on it, but for the length of the cache.

  `evaluate` decodes its benchmarks with these same keys.
  """

  cache_len: int = 1024  # positions of a row: a prompt and the tokens after it
  cache_dtype: str = ""  # of the KV cache: int8 | "", the compute dtype; int8 changes outputs
  # slightly
  batch_size: int = 32  # rows decoded at once
  prefill_rows: int = 4  # prompts read at once …
  prefill_chunk: int = 64  # … and how many tokens of each
  steps: int = 8  # tokens of a row between two looks at the text


@dataclasses.dataclass(frozen=True)
class GenerateOptions(DecodingOptions):
  """What `generate` samples from the teacher.

  `evaluate` prompts and decodes as is said here: with `chat`, `stop` (of benchmarks without
  their own), `repetition`, `server` (of the teacher) and all of DecodingOptions. What it samples
  is in section `evaluate`.
  """

  prompts: str = ""  # a .jsonl file, an object a line; or a text file, a prompt a line
  field: str = "prompt"  # of the objects: text, or a list of chat messages; "text" of a filtered
  # sample: its completion is the next prompt, and its answer key is carried over
  template: str = ""  # applied to each prompt, or to the last of its messages; contains {prompt},
  # such as "Say in other words, with all numbers:\n{prompt}"; "": prompts as they are
  chat: bool = False  # text is a user's message in a chat; else it is what the model continues
  samples: int = 1  # of each prompt
  max_new_tokens: int = 256
  on_bad: str = "stop"  # stop | skip, where a prompt cannot be used
  temperature: float = 1.0  # 0: the likeliest token
  top_k: int = 0  # 0: all
  top_p: float = 1.0
  min_p: float = 0.0
  stop: tuple[str, ...] = ()  # a text ends before the first of these
  repetition: int = 0  # a text ends once so many tokens are one run, over and over; 0: never
  ignore_eos: bool = False
  records_dir: str = ""  # a store of the sampled texts, of records.kind; "": none
  server: ServerOptions = ServerOptions()  # where the teacher is served
