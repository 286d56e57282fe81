"""`distill-jax distill`: one command from two Hugging Face folders to a third."""

import json
import subprocess
import sys

import pytest
import tiny
import tiny_transformers
from json_lines import write_lines

from distill_jax import cli
from distill_jax.commands import distill, evaluate, export, record, report, train
from distill_jax.records import collate
from distill_jax.records.shard_buffer import ShardBuffer
from distill_jax.training.metric_writer import read_metrics

transformers = pytest.importorskip("transformers")

COMMON = ("--config.train.steps=6", "--nojson")  # a flag keeps its value within a process


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  path = tmp_path_factory.mktemp("distill")
  tiny_transformers.write_model(path / "teacher", layers=4)
  tiny_transformers.write_model(path / "student", layers=2, seed=1)
  tiny.write_text(path / "notes.txt")
  return path


@pytest.fixture(scope="module")
def whole(models):
  """A run that nothing has interrupted; its result."""
  return run(models, "whole")


def command(folder, workdir="run", *flags, student="student", data="notes.txt"):
  named = {"teacher": folder / "teacher", "data": folder / data, "workdir": folder / workdir}
  named["student"] = student if student == "half" else folder / student
  return ["distill-jax", "distill", *(f"--{k}={v}" for k, v in named.items()), *COMMON, *flags]


def run(folder, *args, **kwargs):
  """Runs the command line in this process, and returns what `run` returned."""
  results = []
  with pytest.MonkeyPatch.context() as patch:
    argv = command(folder, *args, **kwargs)
    patch.setattr(sys, "argv", argv)
    text = distill.text
    patch.setattr(distill, "text", lambda result: results.append(result) or text(result))
    cli.main(argv)
  return results[0]


def refused(capsys, argv):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "argv", argv)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
      cli.main(argv)
  assert stop.value.code == 2
  return capsys.readouterr().err


def weights(folder, workdir):
  return (folder / workdir / "export" / "model.safetensors").read_bytes()


def test_the_student_loads_in_transformers(models, whole):
  assert set(whole["models"]) == {"teacher", "start", "distilled"}
  student = transformers.AutoModelForCausalLM.from_pretrained(whole["export_dir"])
  assert student.config.num_hidden_layers == 2
  generate = transformers.pipeline("text-generation", model=whole["export_dir"])
  assert generate("3 times 6", max_new_tokens=4)[0]["generated_text"].startswith("3 times 6")
  for name in ("report.html", "evaluation.json", "config.py"):
    assert (models / "whole" / name).exists()
  assert 0 < read_metrics(models / "whole" / "train")[-1]["heldout/loss"] < 10
  assert len(whole["samples"]) >= 1
  assert set(whole["samples"][0]) == {"prompt", "teacher", "student"}


def test_the_result_in_words(whole):
  text = distill.text(whole)
  assert "student after" in text
  assert "same first choice" in text
  assert f"pipeline('text-generation', model='{whole['export_dir']}')" in text
  assert "A held-out text, continued by both:" in text


def test_running_it_again_does_nothing(models, whole, monkeypatch, capsys):
  def never(*_):
    raise AssertionError("a finished stage was run again")

  for module in (record, train, evaluate, export):
    monkeypatch.setattr(module, "run", never)
  before = (models / "whole" / "config.py").read_bytes()
  assert run(models, "whole") == whole
  assert "continues" in capsys.readouterr().err
  assert (models / "whole" / "config.py").read_bytes() == before


def test_it_continues_from_its_config_alone(models, whole, capsys, monkeypatch):
  folder = models / "whole"
  argv = ["distill-jax", "distill", f"--config={folder}/config.py", f"--workdir={folder}", "--json"]
  monkeypatch.setattr(sys, "argv", argv)
  cli.main(argv)
  assert json.loads(capsys.readouterr().out.splitlines()[-1]) == whole


@pytest.mark.slow
def test_two_processes_make_the_same_student(models, whole):
  """With the devices of one process; sums over them differ in their order."""
  argv = [sys.executable, "launch/local.py", "--processes=2", "--devices=2", "--"]
  done = subprocess.run([*argv, *command(models, "two")[1:]], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout
  assert "Machine: 4 CPU devices" in done.stdout
  assert done.stdout.count("student after") == 1
  rows = json.loads((models / "two" / "evaluation.json").read_text())["models"]
  assert rows["distilled"]["kl"] == pytest.approx(whole["models"]["distilled"]["kl"], rel=1e-3)


def test_the_single_verbs_take_its_config(models, whole, capsys, monkeypatch):
  """`train` finds its run finished; the config is that of the run."""
  config = f"--config={models}/whole/config.py"
  argv = ["distill-jax", "train", config, f"--workdir={models}/whole/train", "--nojson"]
  monkeypatch.setattr(sys, "argv", argv)
  cli.main(argv)
  assert "step: 5\n" in capsys.readouterr().out


@pytest.mark.slow
def test_stopped_in_every_stage_it_ends_as_if_it_had_not_been(models, whole):
  """An error in the middle of each stage in turn; the next command continues."""
  stopped = []

  def once(patch, owner, name, after):
    """Makes a function raise KeyboardInterrupt at one of its calls."""
    real, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
      calls.append(name)
      if len(calls) == after:
        stopped.append(name)
        raise KeyboardInterrupt
      return real(*args, **kwargs)

    patch.setattr(owner, name, interrupted)

  for owner, name, after in (
    (distill.json_io, "write_json", 1),  # config.py is written, distill.json is not
    (ShardBuffer, "add", 2),
    (collate, "to_device", 6),
    (evaluate.heldout, "_measure", 1),
    (evaluate.side_by_side.dispatch, "generate", 2),
    (export, "export_model", 1),
    (report, "run", 1),
  ):
    with pytest.MonkeyPatch.context() as patch:
      once(patch, owner, name, after)
      with pytest.raises(KeyboardInterrupt):
        run(models, "stopped", "--config.train.checkpoint_every=2")
  assert len(stopped) == 7
  result = run(models, "stopped", "--config.train.checkpoint_every=2")
  assert weights(models, "stopped") == weights(models, "whole")
  for name, row in whole["models"].items():
    assert result["models"][name]["kl"] == row["kl"]
  assert result["samples"] == whole["samples"]


def test_overrides_are_written_into_the_config(models, whole, capsys):
  text = (models / "whole" / "config.py").read_text()
  assert "c.train.steps = 6\n" in text
  err = refused(capsys, command(models, "whole", "--config.optim.peak_lr=0.5"))
  assert "optim.peak_lr" in err
  assert (models / "whole" / "config.py").read_text() == text
  run(models, "whole", "--config.evaluate.chunk=32")  # this may change
  assert "c.evaluate.chunk = 32\n" in (models / "whole" / "config.py").read_text()


@pytest.mark.slow
def test_half_of_the_teacher_on_chats_as_json(models, capsys):
  rows = [{"prompt": f"{i} + 1?", "completion": f"It is {i + 1}."} for i in range(60)]
  write_lines(models / "pairs.jsonl", rows)
  argv = command(models, "chats", "--json", student="half", data="pairs.jsonl")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "argv", argv)
    cli.main(argv)
  out, err = capsys.readouterr()
  result = json.loads(out.splitlines()[-1])
  assert result["samples"][0]["prompt"].endswith("+ 1?")
  assert "layers of the teacher, a llama model with 2 layers" in err
  assert "the teacher's 4 layers" in (models / "chats" / "config.py").read_text()
  assert "+ 1?" in distill.text(result)


def test_a_workdir_of_another_run(models, whole, capsys):
  tiny_transformers.write_model(models / "other", layers=2, seed=2)
  err = refused(capsys, command(models, "whole", student="other"))
  assert f"--student is '{models}/other'; expected '{models}/student'" in err
  assert "Choose another --workdir" in err
  (models / "taken").mkdir()
  (models / "taken" / "config.json").write_text("{}")
  assert "taken, which holds another run" in refused(capsys, command(models, "taken"))


def test_what_does_not_fit_is_refused_before_anything_runs(models, capsys):
  def error_of(*flags, **kwargs):
    """Returns the last line of the error output."""
    err = refused(capsys, command(models, "refused", *flags, **kwargs))
    assert "Traceback" not in err
    assert not (models / "refused" / "records").exists()
    return err.splitlines()[-1]

  assert "--student is" in error_of(student="nowhere")
  tiny_transformers.write_model(models / "foreign", layers=2, extra="<foreign>")
  assert "have different tokenizers" in error_of(student="foreign")
  (models / "empty.txt").write_text("")
  assert "empty.txt, which is empty" in error_of(data="empty.txt")
  assert "Did you mean --config.train.steps?" in error_of("--config.train.stpes=3")
  assert "neither a verb nor a flag" in error_of("word")
  assert error_of("--techer=x") == "error: --techer is not a flag. Did you mean --teacher?"


@pytest.mark.parametrize("flag", ["teacher", "data", "workdir"])
def test_a_flag_that_is_missing(flag, models, capsys):
  from absl import flags

  flags.FLAGS.unparse_flags()
  flags.FLAGS[flag].value = None
  argv = [word for word in command(models) if not word.startswith(f"--{flag}=")]
  assert f"--{flag} is missing" in refused(capsys, argv)


def test_a_teacher_that_is_not_a_decoder(models, tmp_path, capsys):
  config = transformers.BertConfig(
    vocab_size=258, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
  )
  transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "teacher")
  tiny_transformers.write_tokenizer(tmp_path / "teacher")
  (tmp_path / "notes.txt").symlink_to(models / "notes.txt")
  err = refused(capsys, command(tmp_path, student="half"))
  assert "expected a decoder-only language model" in err
