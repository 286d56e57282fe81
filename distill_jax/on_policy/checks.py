"""Checks of the student and its teachers before the first round.

Each check is of a failure that others have reported: training continues and its loss falls, but
the texts grow without end, or the teacher scores something other than what the student wrote.
Nothing is loaded or compiled. The checks read the files of the tokenizers, the configs of the
models and the first COMPARED prompts; comparing two vocabularies of 150,000 tokens takes some
seconds.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from distill_jax.config import Config
from distill_jax.cross_tokenizer.chat_markers import dated, find_markers
from distill_jax.cross_tokenizer.roles import stop_set
from distill_jax.data import corpus, token_bytes
from distill_jax.data.chat_template import ChatTemplate
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError, bad_value
from distill_jax.generation import local
from distill_jax.generation.job import GenerationJob
from distill_jax.generation.prompts import Message, Prompts, model_input
from distill_jax.hub.tokenizer import check_vocabulary
from distill_jax.losses import FeatureLoss
from distill_jax.models.loading import ModelSource
from distill_jax.on_policy import run_setup

COMPARED = 16  # prompts that are rendered by the templates of student and teacher
AROUND = 24  # characters shown before and after a difference of two texts
WITH_TOP_TOKENS = ("dense", "topk")  # kinds of scores with the most probable tokens of the teacher


class Texts(NamedTuple):
  """The student's texts, as the teachers are to read them.

  Attributes:
    job: The job that samples them.
    tokenizer: Their tokenizer.
    ends: The ids that end a text.
    prompts: The first prompts: (number, text or messages).
  """

  job: GenerationJob
  tokenizer: Tokenizer
  ends: tuple[int, ...]
  prompts: Sequence[tuple[int, str | list[Message]]]

  @property
  def chats(self) -> list[tuple[int, list[Message]]]:
    """The prompts that are chats."""
    return [(n, content) for n, content in self.prompts if not isinstance(content, str)]


def check(config: Config, student: ModelSource, teachers: Mapping[str, ModelSource]) -> list[str]:
  """Checks that the teachers read and end texts as the student writes them.

  Args:
    config: The config of the run.
    student: The student.
    teachers: The teachers by name, also those on servers, of which only the files of the tokenizer
      are read.

  Returns:
    Sentences about what is allowed, but changes what is learned. They are to be printed.

  Raises:
    InputError: A text would not end, or a teacher would score another text than the student's.
  """
  _check_options(config)
  job = run_setup.sampling_job(config, student)
  tokenizer = corpus.tokenizer_of(config.data, student.pretrained)
  check_vocabulary(tokenizer.vocab_size, student.text_config.vocab_size, tokenizer.where)
  first = itertools.islice(Prompts(job).read(), COMPARED)
  prompts = [(p.number, model_input(job, p.content)) for p in first if not p.rejected]
  texts = Texts(job, tokenizer, local.end_tokens(job, tokenizer), prompts)
  notes = _sampling_notes(texts)
  if texts.chats:
    _check_turn_end(corpus.template_of(config.data, student.pretrained), texts)
  for name, teacher in teachers.items():
    notes += _check_teacher(config, texts, student, name, teacher)
    if not config.train.online:
      notes += earlier_teacher(student, teacher)
  return notes


def earlier_teacher(student: ModelSource, teacher: ModelSource) -> list[str]:
  """Returns a sentence if the student is a run with another teacher than that of the rounds."""
  earlier = student.run.config.teacher.source if student.run else ""
  if earlier in ("", teacher.options.source):
    return []
  return [
    f"{student.name} was trained with the teacher {earlier}, and {teacher.name} scores its texts: "
    "with stored scores, such a student keeps a bias however long it is trained (arXiv:2604.13010)."
  ]


def _check_options(config: Config) -> None:
  c, generate = config.on_policy, config.generate
  for key, value, is_valid, expected in (
    ("min_overlap", c.min_overlap, 0 <= c.min_overlap <= 1, "a fraction from 0 to 1"),
    ("max_drift", c.max_drift, c.max_drift >= 0, "0 (no limit) or more nats"),
  ):
    if not is_valid:
      raise bad_value(f"on_policy.{key}", value, expected, "Correct it")
  kind = "dense" if config.train.online else config.records.kind
  if c.min_overlap and kind not in WITH_TOP_TOKENS:
    raise bad_value(
      "on_policy.min_overlap",
      c.min_overlap,
      f"0 for scores of the kind {kind!r}, which lack the teacher's most probable tokens",
      "Set records.kind=topk or train.online=True, or set it to 0",
    )
  missing = config.records.missing_mass
  if kind == "topk" and missing == "renormalise":
    raise bad_value(
      "records.missing_mass",
      missing,
      "'tail_bucket' for the student's own texts, whose tokens are often not among the entries: "
      "without a tail, the student's probability of all other tokens would not count",
      "Set it to 'tail_bucket'",
    )
  if generate.ignore_eos:
    expected = "False, since the student would never learn where a text ends"
    raise bad_value("generate.ignore_eos", True, expected, "Remove it")
  GenerationJob.from_config(config).check()


def _sampling_notes(texts: Texts) -> list[str]:
  """Returns sentences about sampling that is not from the student's whole distribution."""
  notes, sampling = [], texts.job.sampling
  plain = dataclasses.asdict(type(sampling)())
  changed = {k: v for k, v in dataclasses.asdict(sampling).items() if v != plain[k]}
  if changed:
    named = ", ".join(f"generate.{key}={value}" for key, value in changed.items())
    notes.append(
      f"Texts are sampled with {named}, and the losses are of temperature 1 without truncation: "
      "their mean over such texts is not the divergence of the student's own texts."
    )
  if not texts.ends and not texts.job.stop:
    notes.append(
      f"{texts.tokenizer.where} has no token that ends a text, so that every text has "
      f"{texts.job.max_new_tokens} tokens (generate.max_new_tokens)."
    )
  return notes


def _check_turn_end(template: ChatTemplate, texts: Texts) -> None:
  """Checks that a text ends where the template ends the assistant's turn.

  Raises:
    InputError: It does not.
  """
  try:
    end = find_markers(template, texts.tokenizer).end_id
  except InputError:  # a template without a regular form has no known end
    return
  if not _ends_at(texts, texts.tokenizer, end):
    raise _unended(f"{template.where} ends", texts, texts.tokenizer, [end])


def check_features(config: Config, teachers: Mapping[str, ModelSource]) -> None:
  """Checks feature losses, which compare the same layers of all teachers in the step.

  Args:
    config: The config of the run.
    teachers: The teachers in the step, by name.

  Raises:
    InputError: There is a feature loss, and the teachers have different layers.
  """
  shapes = {
    name: (t.config.num_hidden_layers, t.config.hidden_size) for name, t in teachers.items()
  }
  for name, fn in config.losses.items():
    if isinstance(fn, FeatureLoss) and len(set(shapes.values())) > 1:
      found = ", ".join(f"{n} {layers} of width {width}" for n, (layers, width) in shapes.items())
      raise InputError(
        f"losses.{name} compares the same layers of all teachers, but their numbers of layers are: "
        f"{found}. Remove the loss, or use teachers of one shape."
      )


def check_positions(length: int, name: str, teacher: ModelSource) -> None:
  """Raises InputError, with the name of the teacher, if texts have more positions than it has."""
  if length > (limit := teacher.text_config.max_position_embeddings):
    expected = f"at most {limit}, the number of positions of the teacher {name}"
    raise bad_value("generate.cache_len", length, expected, "Reduce it")


def _check_sizes(config: Config, texts: Texts, name: str, teacher: ModelSource) -> None:
  """Raises InputError if a teacher has too few tokens, or positions for the texts of the step."""
  shape, length = teacher.text_config, config.generate.cache_len
  where = _tokenizer_read_by(texts, name)
  check_vocabulary(texts.tokenizer.vocab_size, shape.vocab_size, where)
  if config.train.online:
    check_positions(length, repr(name), teacher)


def _check_teacher(
  config: Config, texts: Texts, student: ModelSource, name: str, teacher: ModelSource
) -> list[str]:
  """Checks one teacher; returns sentences to print."""
  is_here = not config.generate.server.urls or config.train.online
  if teacher.tokenizer is None:
    if is_here:  # the files do not name tokens
      _check_sizes(config, texts, name, teacher)
    return []
  files = teacher.tokenizer
  theirs = corpus.of_files(files, teacher.name)
  different, unknown = compare_tokens(texts.tokenizer, theirs)
  if different:
    return _other_tokens(config, texts, name, theirs, different[0])
  _check_sizes(config, texts, name, teacher)
  notes = []
  if unknown:
    notes.append(
      f"The teacher {name!r} lacks {len(unknown)} of the student's tokens, e.g. id {unknown[0]} "
      f"({texts.tokenizer.piece(unknown[0])!r}). Its scores of texts with them have no meaning."
    )
  ends = stop_set(theirs, teacher.generation, files.config)
  if lost := sorted(i for i in ends if not _ends_at(texts, theirs, i)):
    raise _unended(f"The teacher {name!r} ends", texts, theirs, lost)
  if texts.chats:
    if not files.chat_template:
      return [*notes, f"The teacher {name!r} has no chat template, but the prompts are chats."]
    ours = corpus.template_of(config.data, student.pretrained)
    check_templates(texts.chats, ours, ChatTemplate.of(files, teacher.name), name)
  if len(texts.chats) < len(texts.prompts) and texts.tokenizer.begin != theirs.begin:
    raise InputError(
      f"The tokenizer of the teacher {name!r} begins a text with the tokens {theirs.begin}, that "
      f"of the student with {texts.tokenizer.begin}. Set data.tokenizer to the teacher's folder."
    )
  return notes


def _tokenizer_read_by(texts: Texts, name: str) -> str:
  """Returns how messages name the tokenizer of the texts that a teacher reads."""
  return f"{texts.tokenizer.where}, whose tokens the teacher {name!r} reads,"


def compare_tokens(ours: Tokenizer, theirs: Tokenizer) -> tuple[list[int], list[int]]:
  """Compares two tokenizers id by id, by the bytes of the tokens.

  Returns:
    The ids that are different tokens in the two, and the ids that only the first one has.
  """
  if ours.digest == theirs.digest:
    return [], []
  a, b = token_bytes.reader(ours), token_bytes.reader(theirs)
  pairs = [(i, a(i), b(i) if i < theirs.vocab_size else b"") for i in range(ours.vocab_size)]
  different = [i for i, x, y in pairs if x and y and x != y]
  return different, [i for i, x, y in pairs if x and not y]


def _other_tokens(config: Config, texts: Texts, name: str, theirs: Tokenizer, i: int) -> list[str]:
  """Returns sentences about a teacher with other tokens, whose distributions are projected.

  Raises:
    InputError: The teacher is on servers, which do not give whole distributions.
  """
  difference = (
    f"The teacher {name!r} has other tokens than the student: id {i} is "
    f"{texts.tokenizer.piece(i)!r} in {texts.tokenizer.where} and {theirs.piece(i)!r} in "
    f"{theirs.where}"
  )
  if config.generate.server.urls:
    raise InputError(
      f"{difference}. Servers score the student's tokens alone: remove generate.server.urls, so "
      "that the teacher runs here and its distributions are projected to the student's tokens."
    )
  notes = [f"{difference}. Its distributions are projected to the student's tokens."]
  for loss, fn in config.losses.items():
    if getattr(fn, "divergence", "") == "reverse_kl":
      notes.append(
        f"losses.{loss} has most of its effect on the student's tokens that no token of the "
        f"teacher {name!r} is projected to, whose probability is 1e-38. Use the divergence "
        "forward_kl or jensen_shannon, or the loss policy_gradient or log_ratio, to avoid this."
      )
  return notes


def _ends_at(texts: Texts, tokenizer: Tokenizer, i: int) -> bool:
  """Returns whether a text of the student ends at a token."""
  return i in texts.ends or any(s in tokenizer.decode([i]) for s in texts.job.stop)


def _unended(subject: str, texts: Texts, tokenizer: Tokenizer, ids: Collection[int]) -> InputError:
  """Returns the error for tokens that end a text, but not a text of the student."""

  def named(tokens: Collection[int]) -> str:
    return ", ".join(f"{i} ({tokenizer.piece(i)!r})" for i in tokens) or "no token"

  return InputError(
    f"{subject} a text with {named(ids)}, but the student's texts end with {named(texts.ends)}: it "
    "would learn to write past their end. Add the ids to eos_token_id in generation_config.json of "
    "the student, or their texts to generate.stop."
  )


def check_templates(
  chats: Sequence[tuple[int, Sequence[Message]]],
  ours: ChatTemplate,
  theirs: ChatTemplate,
  name: str,
) -> None:
  """Checks that two templates render prompts with the same bytes.

  Args:
    chats: The prompts: (number, messages).
    ours: The template of the texts.
    theirs: The teacher's template.
    name: The teacher's name.

  Raises:
    InputError: They do not.
  """
  ours, theirs = dated(ours), dated(theirs)
  for number, messages in chats:
    a, b = (t.render(messages, add_generation_prompt=True) for t in (ours, theirs))
    if a != b:
      same = zip(a, b, strict=False)
      at = next((i for i, (x, y) in enumerate(same) if x != y), min(len(a), len(b)))
      shown = [repr(text[max(0, at - AROUND) : at + AROUND]) for text in (a, b)]
      raise InputError(
        f"The chat templates of the student and of the teacher {name!r} render prompt {number} "
        f"differently from character {at} on: {shown[0]} and {shown[1]}. Set data.tokenizer to the "
        "teacher's folder, or copy its chat template into the student's."
      )
