"""What `generate` samples, and from which server."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class ServerOptions:
  """An OpenAI-compatible server that a teacher stands behind, as vLLM and SGLang are."""

  url: str = ""  # as http://localhost:8000/v1; "": the teacher runs here
  model: str = ""  # its name there; "": the only one that is served
  api_key_env: str = ""  # the environment variable that holds the key; "": no key
  in_flight: int = 32  # requests at once
  requests_per_minute: float = 0.0  # 0: as many as there can be
  timeout_s: float = 600.0  # for a whole answer
  retries: int = 8  # of a request, after waits that grow
  top_logprobs: int = 0  # of each token, kept in responses.jsonl for `record`; 0: none
  extra: dict[str, Any] = dataclasses.field(default_factory=dict)  # more fields of a request


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
  """What `generate` asks of the teacher. Text never depends on how it is computed."""

  prompts: str = ""  # a .jsonl file, an object a line; or a text file, a prompt a line
  field: str = "prompt"  # of the objects: text, or a list of chat messages; "text" of what `filter`
  # has kept, to ask what the teacher said, with the answer keys of what it was asked
  template: str = ""  # what each prompt, or the last of its messages, is put into where this says
  # {prompt}, as "Say in other words, with all numbers:\n{prompt}"; "": prompts as they are
  chat: bool = False  # text is what a user says in a chat; else it is what the model goes on from
  samples: int = 1  # of each prompt
  max_new_tokens: int = 256
  cache_len: int = 1024  # positions of a row: a prompt and what comes of it
  cache_dtype: str = ""  # int8 | "", the compute dtype, of what is kept of positions; int8 changes
  # what is said, a little
  on_bad: str = "stop"  # stop | skip, what is to happen where a prompt cannot be used
  temperature: float = 1.0  # 0: the likeliest token
  top_k: int = 0  # 0: all
  top_p: float = 1.0
  min_p: float = 0.0
  stop: tuple[str, ...] = ()  # a text ends before the first of these
  repetition: int = 0  # a text ends once so many tokens are one run, over and over; 0: never
  ignore_eos: bool = False
  records_dir: str = ""  # a store of what was said, as records.kind has it; "": none
  batch_size: int = 32  # rows at once
  prefill_rows: int = 4  # prompts that are read at once …
  prefill_chunk: int = 64  # … and how many tokens of each
  steps: int = 8  # tokens of a row between two looks at the text
  server: ServerOptions = ServerOptions()  # the teacher is behind this one
