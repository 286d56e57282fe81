"""Configs: ml-collections files at the edge, frozen dataclasses inside.

The dataclasses below declare every key, its type and its default once. A file in configs/
starts from `base()`, which holds them all, so that any key can be overridden on the command
line and an unknown one is refused; `resolve` turns the result into a `Config` once.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import Any

from ml_collections import ConfigDict

from distill_jax import registry
from distill_jax.errors import InputError
from distill_jax.schedules import Schedule

# Packages whose modules are entries of a config, and the dataclass in each of them.
FOLDERS = {
  "losses": "Loss", "filters": "Filter", "evals": "Set", "tasks": "Task",
  "augmentations": "Augmentation",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Model:
  """Where a model comes from and how it is computed."""

  source: str = ""  # a folder, a .gguf, "package:…", "hub:…", "run:WORKDIR"; "": random weights
  family: str = "llama"  # without a source: a module of distill_jax/models …
  shape: str = ""  # … and one of its named shapes; beside a source, what preflight goes by
  digest: str = ""  # the sha256 that the source must have (a store's manifest names it); "": any
  keep_layers: tuple[int, ...] = ()  # layers of the source to keep; (): all
  changes: dict[str, Any] = dataclasses.field(default_factory=dict)  # fields of the family's Config
  # that are not as the source or the named shape has them, as {"num_labels": 10}
  new: tuple[str, ...] = ()  # beginnings of Hugging Face's names of parameters that start random,
  # whatever the source holds, as "classifier"
  dtype: str = "float32"  # of matrix products
  param_dtype: str = "float32"  # of the stored parameters
  remat: str = "none"  # none | dots | offload | full
  attention: str = "auto"  # auto | xla | splash | cudnn
  rules: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # rows of
  # sharding.TABLE that are this model's own: {"experts": ("fsdp", "tensor")}


@dataclasses.dataclass(frozen=True)
class Lora:
  """Low-rank adapters, trained in the place of the model's own weights."""

  rank: int = 0  # 0: none, and all weights are trained
  alpha: float = 16.0  # a weight W is used as W + alpha / rank * A B
  targets: tuple[str, ...] = (  # Hugging Face's names of linear layers, or ends of dotted ones
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
  )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Quantise:
  """Integer weights of linear layers, in training and after it: see quantise.py."""

  bits: int = 0  # 4 | 8; 0: none
  group: int = 0  # inputs that share a scale; 0: all of an output's


@dataclasses.dataclass(frozen=True)
class Share:
  """Layers that have their weights in common: see share.py."""

  layers: int = 0  # different ones, of which the model's are made; 0: each is its own
  order: str = "cyclic"  # cyclic, the first again after the last | grouped, neighbours alike
  start: str = "mean"  # mean | first, of a source's layers that are to be one
  lora: Lora = Lora()  # each layer's own difference, which starts from the source's


@dataclasses.dataclass(frozen=True)
class Student(Model):
  """The model that is trained."""

  lora: Lora = Lora()
  share: Share = Share()
  quantise: Quantise = Quantise()
  frozen: tuple[str, ...] = ()  # beginnings of Hugging Face's names of parameters that stay as
  # they are, as "model.encoder.", without optimizer state


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices on each mesh axis; -1 is the rest."""

  data: int = 1
  fsdp: int = -1
  tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Data:
  """The corpus that is packed into sequences."""

  kind: str = "text"  # pydoc | text | jsonl | chat | tfds
  path: str = ""
  split: str = "train"
  field: str = "text"
  heldout_fraction: float = 0.1
  tokenizer: str = ""  # "": the model's own
  seq_len: int = 1024
  sequences: int = 0  # at most this many; 0: all
  on_bad: str = "stop"  # stop | skip, what is to happen where a chat cannot be used
  trust: str = ""  # field of a chat's line: how far its labels are to be trusted, from 0 to 1, as
  # votes leave "agreement"; what is missing to 1 is label smoothing (losses/ce.py); "": 1


@dataclasses.dataclass(frozen=True)
class Records:
  """What is stored of the teacher, and how the pass over the corpus runs."""

  kind: str = "sampled"  # sampled | topk | text | dense, all classes of a task
  task: str = ""  # which of `tasks`; "": the only one
  n: int = 63  # points of systematic sampling, or the k of topk
  logp: bool = False  # sampled: true log-probabilities beside the counts
  nucleus: float = 1.0  # topk: entries end where their mass reaches this
  missing_mass: str = "tail_bucket"  # topk: tail_bucket | renormalise
  temperature: float = 1.0
  taps: tuple[int, ...] = ()  # layers whose outputs are stored, int8
  taps_of: str = "hidden"  # hidden | qkv, the layers' queries, keys and values
  taps_width: int = 0  # of a fixed random projection of the taps; 0: none
  logprobs: str = ""  # a JSONL dump of a served teacher's responses, instead of a teacher here
  logprobs_format: str = "vllm"  # vllm | sglang | openai
  batch_size: int = 8
  chunk: int = 128  # positions of each sequence whose logits exist at once
  sequences_per_shard: int = 1024


@dataclasses.dataclass(frozen=True)
class Optim:
  """AdamW and the learning rate's course."""

  peak_lr: float = 3e-4
  schedule: str = "cosine"  # cosine | linear | constant | wsd
  warmup_steps: int = 0
  decay_fraction: float = 0.2  # wsd: the last part of training, in which the rate falls
  end_fraction: float = 0.0  # of the peak, at the end
  plateau_patience: int = 0  # steps without a better loss until the rate halves; 0: never
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0
  accumulate: int = 1  # microbatches a step
  balance_every: int = 0  # steps between measurements of the losses' gradient norms, which are
  # then held in the ratio of their weights; 0: weights are weights


@dataclasses.dataclass(frozen=True)
class Train:
  """The length of a run and where its data lies."""

  records: tuple[str, ...] = ()  # stores; several are mixed
  mixture: tuple[float, ...] = ()  # their weights; (): by size
  teachers: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # name: the
  # stores of one more teacher, of the same text, one for each of `records`
  online: bool = False  # the teacher runs in the step, and its records are not read
  steps: int = 1000
  batch_size: int = 8  # sequences a step, over all devices
  chunk: int = 128  # positions of each sequence whose logits exist at once
  checkpoint_every: int = 500
  keep: int = 2  # checkpoints, the last ones
  keep_every: int = 0  # and each whose step is a multiple of this; 0: none


@dataclasses.dataclass(frozen=True)
class Evaluate:
  """What `evaluate` measures: loss on held-out text, and the sets in `evals`.

  Samples of sets are taken as `generate` takes them, with its keys but for those here.
  """

  models: dict[str, str] = dataclasses.field(default_factory=dict)  # name: source; of a server
  # its address, as http://localhost:8000/v1, or http://…/v1#MODEL where it has several
  heldout: bool = True  # the loss on held-out text, of the teacher and "start", the student
  # before training, too
  sequences: int = 0  # held-out sequences; 0: all
  batch_size: int = 8  # sequences at once, of text and of choices
  on: tuple[str, ...] = ()  # who is asked the sets: of `models`, "teacher" and "start"; ():
  # all of `models`, or the teacher where there are none
  samples: int = 1  # of each question; DeepSeek-R1's protocol: 64 …
  temperature: float = 0.6
  top_p: float = 0.95
  max_new_tokens: int = 1024  # … and 32,768
  on_bad: str = "stop"  # stop | skip, what is to happen where a question cannot be used


@dataclasses.dataclass(frozen=True)
class Server:
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
class Generate:
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
  server: Server = Server()  # the teacher is behind this one


@dataclasses.dataclass(frozen=True)
class Filter:
  """What `filter` reads, and the order of `filters`."""

  samples: str = ""  # what `generate` wrote, or the folder it is in; "": the workdir
  order: tuple[str, ...] = ()  # names in `filters`, all of them; (): there is only one
  on_bad: str = "stop"  # stop | skip, what is to happen where a sample cannot be judged


@dataclasses.dataclass(frozen=True)
class Export:
  """The Hugging Face folder."""

  dir: str = ""
  step: int = 0  # of the checkpoint; 0: the last
  evaluation: str = ""  # an evaluation.json whose numbers go on the model card
  lora: str = "merged"  # of a run with adapters: merged | peft, they alone | base, all but they
  dtype: str = "bfloat16"
  shard_bytes: int = 5_000_000_000


@dataclasses.dataclass(frozen=True)
class Shrink:
  """The smaller model that `shrink` makes of the teacher; 0 is as many as the teacher has."""

  layers: int = 0  # more than the teacher has: some of them twice
  layers_by: str = "loss"  # even | ends | influence | loss, how they are chosen
  hidden: int = 0  # channels of the embedding
  intermediate: int = 0  # channels of a dense feed-forward
  heads: int = 0
  kv_heads: int = 0
  kv_heads_by: str = "drop"  # drop, with their query heads | merge, by the mean of neighbours
  experts: int = 0
  experts_by: str = "drop"  # drop | merge, into the nearest that is kept
  expert_intermediate: int = 0  # channels of one expert
  window: int = 0  # positions that a layer sees, the last ones …
  global_every: int = 4  # … but the last of so many layers, which sees all; 0: none does
  factorise: dict[str, int] = dataclasses.field(default_factory=dict)  # matrix: rank, by the
  # end of its dotted name, as {"down_proj": 64}
  sequences: int = 32  # of data, by which importance is measured
  dir: str = ""  # the Hugging Face folder that is made; "": "model" in the workdir
  target_params: float = 0.0  # search: so many parameters …
  target_bytes: float = 0.0  # … or so many bytes in export.dtype …
  target_decode_rate: float = 0.0  # … or so many tokens a second, one text at a time, here
  steps: int = 100  # of distillation of each candidate


@dataclasses.dataclass(frozen=True)
class Link:
  """One student of a chain, taught by the model before it: see chain.py."""

  student: Student = Student()  # without source and shape: made of the model before it, …
  shrink: Shrink = Shrink()  # … by these sizes
  steps: int = 0  # 0: train.steps
  peak_lr: float = 0.0  # 0: optim.peak_lr


@dataclasses.dataclass(frozen=True)
class Efficiency:
  """What `efficiency` compares the teacher and the student at."""

  context: int = 4096  # positions of a row: what it has read and what it has said
  batch_sizes: tuple[int, ...] = (1, 8, 64, 512)
  chip: str = "v5p"  # v4 | v5e | v5p | v6e | tpu7x
  teacher_dtype: str = "bfloat16"  # float32 | bfloat16 | float8, of its weights as it is served
  student_dtype: str = "bfloat16"
  cache_dtype: str = "bfloat16"  # of both
  measure: bool = False  # runs both here too, at this context and these batch sizes
  rounds: int = 5  # of measuring, each with both models


@dataclasses.dataclass(frozen=True)
class Inspect:
  """What `inspect` does beside describing a store."""

  sequence: int = -1  # shows this one, token by token; -1: none
  verify: bool = False  # reads every record and checks every digest


@dataclasses.dataclass(frozen=True)
class Config:
  """The whole story of a run."""

  seed: int = 0
  teacher: Model = Model()
  teachers: dict[str, str] = dataclasses.field(default_factory=dict)  # name: source of one more
  # teacher that runs in the step, computed as `teacher` is
  student: Student = Student()
  mesh: Mesh = Mesh()
  data: Data = Data()
  records: Records = Records()
  losses: dict[str, Any] = dataclasses.field(default_factory=dict)  # name: Loss
  optim: Optim = Optim()
  train: Train = Train()
  evaluate: Evaluate = Evaluate()
  evals: dict[str, Any] = dataclasses.field(default_factory=dict)  # name: Set
  generate: Generate = Generate()
  filter: Filter = Filter()
  filters: dict[str, Any] = dataclasses.field(default_factory=dict)  # name: Filter
  tasks: dict[str, Any] = dataclasses.field(default_factory=dict)  # name: Task; none: the next
  # token of the corpus in `data`. Of several, each has a part of the student's head, in order,
  # and train.records names a store for each, or none
  augmentations: dict[str, Any] = dataclasses.field(default_factory=dict)  # name: Augmentation
  export: Export = Export()
  shrink: Shrink = Shrink()
  chain: tuple[str, ...] = ()  # names in `links`, from the teacher to the last student
  links: dict[str, Link] = dataclasses.field(default_factory=dict)
  efficiency: Efficiency = Efficiency()
  inspect: Inspect = Inspect()
  profile_steps: str = ""  # the flag --profile_steps


def base() -> ConfigDict:
  """Every key with its default, for a file in configs/ to start from."""
  return ConfigDict(dataclasses.asdict(Config()))


def loss(name: str, **fields: Any) -> ConfigDict:
  """One entry of `losses`: a module of distill_jax/losses with all its keys.

  A weight or temperature is a number or `schedule(...)`.
  """
  return _entry("losses", name, fields)


def filter(name: str, **fields: Any) -> ConfigDict:
  """One entry of `filters`: a module of distill_jax/filters with all its keys."""
  return _entry("filters", name, fields)


def eval_set(name: str, **fields: Any) -> ConfigDict:
  """One entry of `evals`: a set of distill_jax/evals with all its keys."""
  return _entry("evals", name, fields)


def task(name: str, **fields: Any) -> ConfigDict:
  """One entry of `tasks`: a module of distill_jax/tasks with all its keys."""
  return _entry("tasks", name, fields)


def augmentation(name: str, **fields: Any) -> ConfigDict:
  """One entry of `augmentations`: a module of distill_jax/augmentations with all its keys."""
  return _entry("augmentations", name, fields)


def link(**fields: Any) -> ConfigDict:
  """One entry of `links`, with all its keys: link(steps=64, student={"source": …})."""
  entry = ConfigDict(dataclasses.asdict(Link()))
  _known(fields, entry, "links")
  entry.update(fields)
  return entry


def _entry(package: str, name: str, fields: dict[str, Any]) -> ConfigDict:
  keys = {
    f.name: f.default.values[0] if isinstance(f.default, Schedule) else f.default
    for f in dataclasses.fields(getattr(registry.load(package, name), FOLDERS[package]))
  }
  _known(fields, keys, f"{package}.{name}")
  return ConfigDict({_key(package): name, **keys, **fields}, type_safe=False)


def _key(package: str) -> str:
  """What names an entry's module, as "loss"."""
  return FOLDERS[package].lower()


def schedule(*points: tuple[float, float], shape: str = "linear") -> dict[str, Any]:
  """A weight or temperature that follows the step: see distill_jax/schedules.py."""
  return {"points": points, "shape": shape}


def resolve(config: ConfigDict) -> Config:
  """A config as frozen dataclasses; what does not fit is refused by its dotted name."""
  tree = config.to_dict()
  entries = {
    package: {name: _made(package, fields, name) for name, fields in tree.pop(package, {}).items()}
    for package in FOLDERS
  }
  return dataclasses.replace(_build(Config, tree, ""), **entries)


def to_dict(config: Config) -> dict[str, Any]:
  """The resolved config as plain values, for a run's config.json."""
  tree = dataclasses.asdict(config)
  for package in FOLDERS:
    for name, value in getattr(config, package).items():
      tree[package][name][_key(package)] = type(value).__module__.rpartition(".")[2]
  return tree


def from_dict(tree: dict[str, Any]) -> Config:
  """The inverse of `to_dict`, from a run's config.json."""
  return resolve(ConfigDict(tree, convert_dict=True))


def _made(package: str, fields: dict[str, Any], name: str) -> Any:
  at, key = f"{package}.{name}", _key(package)
  if key not in fields:
    raise InputError(f"{at} has no key {key!r}; name a module of distill_jax/{package} there")
  cls = getattr(registry.load(package, fields[key]), FOLDERS[package])
  return _build(cls, {k: v for k, v in fields.items() if k != key}, at)


def _known(given: Any, known: Any, at: str) -> None:
  for key in given:
    if key not in known:
      near = difflib.get_close_matches(key, known, 1)
      hint = f"did you mean {near[0]!r}?" if near else f"it holds {', '.join(known)}"
      raise InputError(f"config key {(at + '.' if at else '') + key!r} is unknown; {hint}")


def _build(cls: Any, tree: dict[str, Any], at: str) -> Any:
  """A dataclass from a dict, checked field by field."""
  hints = typing.get_type_hints(cls)
  _known(tree, hints, at)
  path = lambda key: f"{at}.{key}" if at else key
  return cls(**{key: _value(hints[key], value, path(key)) for key, value in tree.items()})


def _value(hint: Any, value: Any, at: str) -> Any:
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if hint is Any:
    return value
  if hint is Schedule:
    if isinstance(value, dict):
      points = tuple((float(s), float(v)) for s, v in value["points"])
      return Schedule(points, value["shape"])
    return Schedule(((0.0, float(_value(float, value, at))),))
  if dataclasses.is_dataclass(hint) and isinstance(value, dict):
    return _build(hint, value, at)
  if origin is tuple and isinstance(value, list | tuple):
    return tuple(_value(args[0], v, at) for v in value)
  if origin is dict and isinstance(value, dict):
    return {k: _value(args[1], v, f"{at}.{k}") for k, v in value.items()}
  if origin is types.UnionType and value is None and type(None) in args:
    return None
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if isinstance(hint, type) and type(value) is hint:
    return value
  want = getattr(hint, "__name__", str(hint))
  raise InputError(f"config key {at!r} is {value!r}, a {type(value).__name__}; it wants {want}")
