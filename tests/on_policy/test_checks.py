"""Checks before the first round: each silent failure is caused, and is refused or told."""

import dataclasses
import json
import types

import chats
import pytest
import small_tokenizers
from json_lines import write_lines

from distill_jax import config
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.models import llama, loading
from distill_jax.on_policy import checks

ENDS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
ROWS = 512  # of the embedding, above the number of tokens


def write_model(folder, eos=(0, 2), template=chats.CHATML, tokenizer=None, rows=ROWS):
  """Writes the files of a model except its weights; returns its folder as text."""
  folder.mkdir()
  tokenizer = tokenizer or small_tokenizers.byte_level(special=ENDS)
  (folder / "tokenizer.json").write_bytes(tokenizer.raw)
  named = {"eos_token": ENDS[eos[-1]], "bos_token": None, "tokenizer_class": "TokenizersBackend"}
  named |= {"chat_template": template} if template else {}
  (folder / "tokenizer_config.json").write_text(json.dumps(named))
  (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(eos)}))
  shape = dataclasses.replace(llama.CONFIGS["tiny"], vocab_size=rows)
  (folder / "config.json").write_text(json.dumps(shape.to_hf()))
  return str(folder)


@pytest.fixture
def pair(tmp_path):
  """Returns a function that checks a student and a teacher whose files differ as its arguments."""

  def run(ours=None, theirs=None, prompt="What is 2 + 3?", **changes):
    c = config.base()
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": prompt}] * 3)
    c.generate.prompts, c.generate.chat = str(tmp_path / "prompts.jsonl"), True
    c.student.source = write_model(tmp_path / "student", **(ours or {}))
    c.teacher.source = write_model(tmp_path / "teacher", **(theirs or {}))
    c.train.online, c.generate.cache_len = True, llama.TINY.max_position_embeddings
    c.update_from_flattened_dict(changes)
    c = config.resolve(c)
    student, teacher = (loading.open_source(m) for m in (c.student, c.teacher))
    return checks.check(c, student, {"teacher": teacher})

  return run


def test_equal_models_are_accepted_without_a_note(pair):
  assert pair() == []


def test_a_teacher_in_the_step_with_too_few_positions_is_refused(pair):
  limit = llama.TINY.max_position_embeddings
  with pytest.raises(InputError, match=f"is {limit + 1}; expected at most {limit}, the number of"):
    pair(**{"generate.cache_len": limit + 1})


def test_feature_losses_need_teachers_of_one_shape():
  """A loss compares the same layers of all, and "last" would be a middle one of some."""
  shapes = [dataclasses.replace(llama.TINY, num_hidden_layers=n) for n in (3, 3, 6)]
  a, same, deep = (types.SimpleNamespace(config=shape) for shape in shapes)
  c = config.base()
  c.losses.soft, c.losses.h = config.loss("kd"), config.loss("hidden", layers="last")
  resolved = config.resolve(c)
  checks.check_features(resolved, {"teacher": a, "code": same})
  with pytest.raises(InputError, match="losses.h .*: teacher 3 of width 32, code 6 of width 32"):
    checks.check_features(resolved, {"teacher": a, "code": deep})
  c.losses = {"soft": config.loss("kd")}
  checks.check_features(config.resolve(c), {"teacher": a, "code": deep})


def test_an_end_of_text_that_the_student_lacks_is_refused(pair):
  # An Instruct teacher ends turns with <|im_end|>, a Base student only documents.
  with pytest.raises(InputError, match=r"ends a text with 2 \('<\|im_end\|>'\).* end with 0 \('<"):
    pair(ours={"eos": (0,)})


def test_without_chats_the_teacher_s_end_is_compared_too(pair):
  with pytest.raises(InputError, match="The teacher 'teacher' ends a text with 2"):
    pair(ours={"eos": (0,)}, **{"generate.chat": False})


def test_the_end_of_a_turn_ends_a_text(pair):
  with pytest.raises(InputError, match="The chat template of .*student ends a text with 2"):
    pair(ours={"eos": (0,)}, theirs={"eos": (0,)})


def test_a_stop_string_bridges_the_ends(pair):
  assert pair(ours={"eos": (0,)}, **{"generate.stop": ("<|im_end|>",)}) == []


def test_templates_that_differ_by_one_byte_are_refused(pair):
  other = chats.CHATML.replace("assistant\\n' }}{% endif", "assistant\\n\\n' }}{% endif")
  assert other != chats.CHATML
  with pytest.raises(InputError, match=r"render prompt 0 differently from character 64 on: '"):
    pair(theirs={"template": other})


def test_equal_bytes_of_different_jinja_are_accepted(pair):
  assert pair(theirs={"template": chats.GENERATION}) == []


def test_data_tokenizer_is_the_template_of_both(pair, tmp_path):
  other = write_model(
    tmp_path / "other", template=chats.CHATML.replace("<|im_end|>", "<|im_end|>.")
  )
  with pytest.raises(InputError, match="chat templates of the student and of the teacher"):
    pair(**{"data.tokenizer": other})


def test_a_teacher_without_a_chat_template_is_reported(pair):
  assert "no chat template, but the prompts are chats" in pair(theirs={"template": ""})[0]


@pytest.mark.parametrize("online", [True, False])
def test_other_tokens_are_reported(online, pair):
  other = small_tokenizers.byte_level(special=ENDS[::-1])
  notes = pair(theirs={"tokenizer": other}, **{"train.online": online})
  assert "projected to the student's tokens" in notes[0] and len(notes) == 1


def test_the_reverse_kl_against_other_tokens_is_reported(pair):
  other = small_tokenizers.byte_level(special=ENDS[::-1])
  losses = {"soft": config.loss("kd", divergence="reverse_kl")}
  notes = pair(theirs={"tokenizer": other}, losses=losses)
  assert "losses.soft has most of its effect on the student's tokens that" in notes[1]


def test_other_tokens_are_refused_on_servers(pair):
  other = small_tokenizers.byte_level(size=300, special=ENDS[::-1])
  urls = {"train.online": False, "generate.server.urls": ("http://localhost:1/v1",)}
  with pytest.raises(InputError, match=r"id 0 is '<\|endoftext\|>' in .* remove generate.server"):
    pair(theirs={"tokenizer": other}, **urls)


def test_another_file_with_the_same_tokens_is_accepted_and_further_tokens_are_reported(pair):
  longer = small_tokenizers.byte_level(special=ENDS, literal=("<think>",))
  notes = pair(ours={"tokenizer": longer})
  assert len(notes) == 1 and "lacks 1 of the student's tokens" in notes[0]


def test_further_tokens_of_the_teacher_are_accepted(pair):
  longer = small_tokenizers.byte_level(special=ENDS, literal=("<think>",))
  assert pair(theirs={"tokenizer": longer}) == []


def test_a_teacher_without_rows_for_all_tokens_is_refused(pair):
  shorter = small_tokenizers.byte_level(size=300, special=ENDS)
  with pytest.raises(InputError, match="400 tokens, but the model's embedding has 300 rows"):
    pair(theirs={"rows": 300, "tokenizer": shorter})


def test_another_beginning_of_texts_is_refused(pair):
  plain = small_tokenizers.byte_level(special=ENDS)
  parsed = json.loads(plain.raw)
  parsed["post_processor"] = {
    "type": "TemplateProcessing",
    "single": [
      {"SpecialToken": {"id": ENDS[0], "type_id": 0}},
      {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {ENDS[0]: {"id": ENDS[0], "ids": [0], "tokens": [ENDS[0]]}},
  }
  other = Tokenizer(json.dumps(parsed).encode(), "with a BOS", None, None)
  assert other.begin == [0]
  with pytest.raises(InputError, match=r"begins a text with the tokens \[0\], that of the"):
    pair(theirs={"tokenizer": other}, **{"generate.chat": False})


def test_sampling_that_changes_the_distribution_is_reported(pair):
  notes = pair(**{"generate.temperature": 0.7, "generate.top_p": 0.95})
  assert len(notes) == 1 and "generate.temperature=0.7, generate.top_p=0.95" in notes[0]


def test_a_student_of_another_teacher_is_reported():
  source = lambda name, run=None: types.SimpleNamespace(
    name=name, run=run, options=types.SimpleNamespace(source=name)
  )
  run = types.SimpleNamespace(config=config.resolve(config.base()))
  earlier = lambda name: dataclasses.replace(
    run.config, teacher=dataclasses.replace(run.config.teacher, source=name)
  )
  student = source("run:a", types.SimpleNamespace(config=earlier("old")))
  (note,) = checks.earlier_teacher(student, source("new"))
  assert "run:a was trained with the teacher old, and new scores its texts" in note
  assert checks.earlier_teacher(student, source("old")) == []
  assert checks.earlier_teacher(source("folder"), source("new")) == []


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"generate.ignore_eos": True}, "generate.ignore_eos is True; expected False"),
    ({"generate.temperature": 0.0, "generate.samples": 2}, "generate.samples is 2; expected 1"),
    ({"on_policy.min_overlap": 1.5}, "on_policy.min_overlap is 1.5; expected a fraction"),
    ({"on_policy.max_drift": -1.0}, "on_policy.max_drift is -1.0; expected 0"),
    (
      {
        "train.online": False,
        "records.kind": "topk",
        "records.missing_mass": "renormalise",
      },
      "records.missing_mass is 'renormalise'; expected 'tail_bucket'",
    ),
    (
      {"on_policy.min_overlap": 0.3, "train.online": False, "records.kind": "labels"},
      "on_policy.min_overlap is 0.3; expected 0 for scores of the kind 'labels'",
    ),
  ],
)
def test_options_that_do_not_fit_are_refused(pair, changes, message):
  with pytest.raises(InputError, match=message):
    pair(**changes)
