"""Distils a model on your own data: records, trains, evaluates, exports and reports.

The sizes of the run (steps, batch size, sequence length) are chosen from the amount of data and
from the machine, and printed. The config is written to config.py in the workdir. The other verbs
take that file, and any key can be overridden here with --config.KEY=VALUE, e.g.
records.heldout_sequences=0 to train without evaluation.

  --teacher   the model to distil from: a Hugging Face folder, a .gguf file, a Hub id such as
              Qwen/Qwen2.5-0.5B, package:NAME/PATH, or run:WORKDIR
  --student   the model to train, named like the teacher and with the same tokenizer; or half,
              third, quarter, two-thirds, three-quarters: that fraction of the teacher's layers.
              Default: half
  --data      a text file, a folder of text files, or JSON lines with "text", with "messages"
              (chats), or with "prompt" and "completion". pydoc: Python's language reference
  --workdir   the folder of the run

Reads: the teacher, the student and the data.

Writes: in the workdir: config.py; records/ and train/ with the stores and the checkpoints;
evaluation.json; examples.json; export/, the student as a Hugging Face folder; report.html. Finished
stages are skipped when the command is run again, and an interrupted stage continues. If keys of
evaluate, evals or export have changed, their stage runs again; export needs a new folder.

Config: data.seq_len, data.sequences, data.heldout_fraction, losses, optim.peak_lr, train.steps,
train.batch_size, records.heldout_sequences, evaluate.sequences, export.dtype.

Example:
  distill-jax distill --teacher=models/teacher --student=half --data=notes.txt --workdir=runs/notes
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill_jax.commands import evaluate, export, record, report, train
from distill_jax.config import Config
from distill_jax.errors import InputError
from distill_jax.hub.export_folder import check_new, exists
from distill_jax.models.runs import RUN
from distill_jax.recipe import config_file, data_source, machine, plan
from distill_jax.recipe.plan import Request
from distill_jax.recipe.result import text  # noqa: F401
from distill_jax.records import planned_stores
from distill_jax.report import examples
from distill_jax.runtime import distributed, json_io, storage
from distill_jax.runtime.atomic_io import atomic_write
from distill_jax.runtime.claim import claimed
from distill_jax.runtime.workdir import Workdir, as_in_file
from distill_jax.types import JsonObject

CONFIG, REQUEST, STAGES = "config.py", "distill.json", "stages"
START = ".start.py"  # in the workdir from the first write until distill.json is there
FOLDERS = ("data", "records", "train", "export", STAGES)
FILES = ("config.json", CONFIG, "evaluation.json", "examples.json", "report.html")
DOC = """\
Written by `distill-jax distill`. The single commands take it, for example

  distill-jax train --config={config} --workdir={workdir}/train
  distill-jax evaluate --config={config} --workdir={workdir}

The command was: {command}"""
ReadConfig = Callable[[Path], Config]


def configure(request: Request, folder: Path, read: ReadConfig) -> Config:
  """Returns the config of a run: the recipe's the first time, later that of config.py.

  Args:
    request: The flags.
    folder: The workdir on this machine.
    read: Reads a config file and applies the overrides of the command line.

  Raises:
    InputError: The models or the data cannot be used, or the workdir holds another run.
  """
  request, folder = request.full(), folder.absolute()
  distributed.run_on_process_0(lambda: _prepare(request, folder, read))
  storage.share(folder / CONFIG)
  return read(folder / CONFIG)


def _prepare(request: Request, folder: Path, read: ReadConfig) -> None:
  """Writes config.py unless the folder holds this run already."""
  named = {"teacher": request.teacher, "student": request.student, "data": request.data}
  if (folder / REQUEST).exists():
    before = json_io.read_object(folder / REQUEST, "choose another --workdir")
    for key, value in named.items():
      if before.get(key) != value:
        raise InputError(
          f"--{key} is {value!r}; expected {before.get(key)!r}, with which the run in {folder} "
          "began. Choose another --workdir."
        )
    say(f"The run in {folder} continues, with its {CONFIG}.")
    return
  _check_new(folder)
  folder.mkdir(parents=True, exist_ok=True)
  start = folder / START
  start.write_text(config_file.text(plan.start(), "The losses of the recipe.", {}))
  try:
    _begin(request, folder, read(start))
  except InputError:  # the corrected command may use the folder
    data_source.discard(folder / "data")
    start.unlink()
    raise
  json_io.write_json(folder / REQUEST, named)
  start.unlink()


def _check_new(folder: Path) -> None:
  """Raises InputError if the run would replace files, unless it was killed while it began."""
  config = folder / CONFIG
  before = config.read_text("utf-8", errors="replace") if config.is_file() else ""
  own = f'"""{DOC.partition("The command")[0]}'.format(config=config, workdir=folder)
  if (folder / START).exists() or before.startswith(own):  # START is not at the URL of a mirror
    return
  for name in FILES + FOLDERS:
    if (folder / name).exists():
      raise InputError(
        f"--workdir is {folder}, which holds another run or project ({name}); expected a new "
        "folder. Choose another --workdir."
      )


def _begin(request: Request, folder: Path, begun: Config) -> None:
  """Chooses the config of a new run and writes config.py.

  Args:
    request: The flags.
    folder: The workdir on this machine.
    begun: The losses of the recipe, with the overrides of the command line.
  """
  chosen = plan.plan(request, begun, folder / "data", machine.this_machine())
  for sentence in chosen.sentences:
    say(sentence)
  path = f"{request.workdir}/{CONFIG}"
  say(f"The config is {path}. The single commands take it: distill-jax train --config={path} …")
  config = chosen.config
  if storage.remote_of(folder) and Path(config.data.path).is_relative_to(folder):
    prepared = storage.hand_over(Path(config.data.path))  # for all hosts
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=prepared))
  _write_config(folder, config, chosen.comments)


def _write_config(folder: Path, config: Config, comments: dict[str, str]) -> None:
  """Writes config.py."""
  doc = DOC.format(
    config=folder / CONFIG, workdir=folder, command=shlex.join(["distill-jax", *sys.argv[1:]])
  )
  doc = doc.replace("\\", r"\\").encode("utf-8", "backslashreplace").decode()
  atomic_write(folder / CONFIG, config_file.text(config, doc, comments))


def run(config: Config, workdir: Path) -> JsonObject:
  """Runs the stages that are not finished, each in a folder of `workdir`.

  Returns:
    config, export_dir and report, paths; export_format; models, the rows of evaluation.json;
    tokens, the number of evaluated ones; samples, the generations of teacher and student; steps.

  Raises:
    InputError: A stage cannot run.
    Preempted: SIGTERM was received; finished work is kept.
  """
  if not config.train.records or "distilled" not in config.evaluate.models:
    raise InputError(
      "--teacher, --student and --data are missing, and the config was not written by distill. "
      "Name the models and the data, or take a single command such as train."
    )
  planned_stores.check_one(config.data)
  distributed.run_on_process_0(lambda: _check_export(config, workdir))
  distributed.run_on_process_0(lambda: _update_config(workdir, config))
  student = config.evaluate.models["distilled"]
  records, trained = config.train.records[0], student.removeprefix(RUN)
  _stage(workdir, "record", "recording the teacher", lambda: _inside(record.run, config, records))
  _stage(workdir, "train", "training the student", lambda: _inside(train.run, config, trained))
  evaluation = _stage(
    workdir,
    "evaluate",
    "evaluating on held-out data",
    lambda: evaluate.run(config, workdir),
    _options(config, "evaluate", "evals"),
  )
  _stage(
    workdir,
    "export",
    "exporting the student",
    lambda: _export(config, workdir, trained),
    _options(config, "export"),
  )
  distributed.run_on_process_0(lambda: _report(config, workdir))
  return {
    "config": str(workdir / CONFIG),
    "report": str(workdir / "report.html"),
    "export_dir": config.export.dir,
    "export_format": config.export.format,
    "steps": config.train.steps,
    "models": evaluation.get("models", {}),
    "tokens": evaluation.get("tokens", 0),
    "samples": [
      {"prompt": g.prompt, "teacher": g.texts["teacher"], "student": g.texts["distilled"]}
      for g in examples.read(workdir).generations
    ],
  }


def _update_config(workdir: Path, config: Config) -> None:
  """Writes overrides into config.py; the workdir has checked that they may change."""
  before = (workdir / CONFIG).read_text("utf-8") if (workdir / CONFIG).exists() else ""
  body = config_file.text(config, "", {}).partition("def get_config")[2]
  without_comments = "\n".join(line.split("  # ")[0] for line in before.splitlines()) + "\n"
  if without_comments.partition("def get_config")[2] != body:
    _write_config(workdir, config, {})


def _stage(
  workdir: Path,
  name: str,
  doing: str,
  work: Callable[[], JsonObject],
  options: JsonObject | None = None,
) -> JsonObject:
  """Returns the result of a stage; one that is finished with the same options is not run again."""
  options = options or {}
  if distributed.max_over_processes(int(_is_noted(workdir, name, options))):
    path = _note(workdir, name)
    return json_io.read_object(path, "delete the workdir") if path.exists() else {}
  say(f"Now {doing} …")
  result = work()
  _write_note(workdir, name, {**result, "options": options})
  distributed.Preemption.check_late("distill", "finished stages are kept")
  return result


def _note(workdir: Path, name: str) -> Path:
  return workdir / STAGES / f"{name}.json"


def _write_note(workdir: Path, name: str, note: JsonObject) -> None:
  path = _note(workdir, name)
  path.parent.mkdir(exist_ok=True)
  json_io.write_json_once(path, note)


def _is_noted(workdir: Path, name: str, options: JsonObject) -> bool:
  """Returns whether a stage has a note with these options, or one that names none."""
  path = _note(workdir, name)
  if not path.exists():
    return False
  return json_io.read_object(path, "delete the workdir").get("options", options) == options


def _options(config: Config, *sections: str) -> JsonObject:
  """Returns sections of the content of config.json."""
  tree = as_in_file(config)
  return {section: tree[section] for section in sections}


def _inside(run: Callable[[Config, Path], JsonObject], config: Config, path: str) -> JsonObject:
  """Runs a command in a workdir, as the command line does."""
  with claimed(path), storage.Synced(path) as folder, Workdir(folder, config) as workdir:
    return run(config, workdir)


def _check_export(config: Config, workdir: Path) -> None:
  """Raises InputError if the folder to export to exists and another run has written it."""
  options = _options(config, "export")
  if not any(_is_noted(workdir, name, options) for name in ("export", "exporting")):
    check_new(config.export.dir)


def _export(config: Config, workdir: Path, trained: str) -> JsonObject:
  """Exports the run; a folder of this run that exists is finished, since it appears only whole."""
  distributed.run_on_process_0(lambda: _check_export(config, workdir))
  if distributed.max_over_processes(int(exists(config.export.dir))):
    return {"export_dir": config.export.dir}
  _write_note(workdir, "exporting", {"options": _options(config, "export")})
  return _inside(export.run, config, trained)


def _report(config: Config, workdir: Path) -> None:
  report.run(config, workdir)


def say(sentence: Any) -> None:
  """Prints a sentence for the user on standard error, from the first process alone."""
  if distributed.is_process_0():
    print(sentence, file=sys.stderr, flush=True)
