"""launch/tpu_pod.py with a gcloud that fails and preempts."""

import json
import os
import shlex
import sys

import pytest
from json_lines import read_lines
from launcher import ROOT, VERB, executable, gke, pod, run

# The paths of VERB are on no host.
POD = ["--name=r1", "--zone=us-east5-a", "--topology=v5p:2x2x2", "--poll=0", "--shared_disk"]
URLS = ["--workdir=gs://b/r1", "--config.train.records=('gs://b/records',)"]
URLS += ["--config.train.heldout=('gs://b/records/heldout',)"]


@pytest.fixture
def gcloud(tmp_path):
  """A fake gcloud on the PATH that logs its arguments and simulates slices; see fake_gcloud.py."""

  def make(runs, fails=(), skips=()):
    folder = tmp_path / "bin"
    folder.mkdir()
    words = [sys.executable, str(ROOT / "tests/fake_gcloud.py"), str(tmp_path)]
    executable(folder / "gcloud", f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    memory = {"state": None, "nodes": {}, "runs": runs, "fails": fails, "skips": skips}
    (tmp_path / "memory.json").write_text(json.dumps(memory))
    return {"PATH": f"{folder}:{os.environ['PATH']}"}

  return make


def logged(tmp_path):
  """Returns the steps that gcloud ran, without `list`, and the arguments of all its calls."""
  lines = read_lines(tmp_path / "log.jsonl")
  what = {"apt-get": "install", "echo installed": "check", "exec 9": "run", "sed ": "log"}

  def step(words):
    command = " ".join(words)
    return next((name for part, name in what.items() if part in command), words[3])

  return [step(words) for words in lines if words[3] != "list"], lines


PREPARED = ["scp", "install", "check"]


def test_a_preempted_and_stopped_pod_continues_to_the_end(gcloud, tmp_path):
  """Preempted once, stopped once (exit code 75), then finished: logs downloaded, slices deleted."""
  pod("up", *POD, "--", *VERB, env=gcloud(["preempted", 75, 0]), cwd=tmp_path)
  steps, _ = logged(tmp_path)
  again = ["delete", "create", *PREPARED, "run"]  # preempted
  assert steps == ["create", *PREPARED, "run", *again, *PREPARED, "run", "log", "delete"]
  log = (tmp_path / "logs/r1/r1.log").read_text().splitlines()
  assert log == [f"{os.uname().nodename}: {line}" for line in ["distill.log", *["hello"] * 2] * 2]


def test_one_of_two_slices_is_preempted(gcloud, tmp_path):
  env = gcloud(["preempted", "suspended", 0])
  pod("up", *POD, "--num_slices=2", "--keep", "--", *VERB, env=env, cwd=tmp_path)
  steps, lines = logged(tmp_path)
  assert (steps.count("create"), steps.count("delete"), steps[-1]) == (3, 2, "log")
  [made, *_] = [words for words in lines if words[3] == "create"]
  assert {"--node-count=2", "--node-prefix=r1"} <= set(made)
  names = {path.name for path in (tmp_path / "logs/r1").iterdir()}
  assert names == {"r1-0.log", "r1-1.log"}


@pytest.mark.parametrize("end", ["lost", "refused", "unreached"])
def test_a_lost_connection_does_not_end_the_run(gcloud, tmp_path, end):
  """The slice still exists: it is not deleted, and the launcher waits for the same run again.

  gcloud exits with 0 if it cannot prepare any slice, e.g. one that has just been preempted.
  """
  pod("up", *POD, "--keep", "--", *VERB, env=gcloud([end, end, 0]), cwd=tmp_path)
  steps, _ = logged(tmp_path)
  assert steps == ["create", *[*PREPARED, "run"] * 3, "log"]


def test_a_slice_that_is_never_reached_is_kept(gcloud, tmp_path):
  done = pod("up", *POD, "--", *VERB, env=gcloud(["unreached"] * 3), code=1, cwd=tmp_path)
  assert "r1 cannot be reached. It still exists and costs money" in done.stderr
  assert "delete" not in logged(tmp_path)[0]


def test_single_steps_fail_if_no_host_is_reached(gcloud, tmp_path):
  env = gcloud(["unreached"])
  pod("run", *POD, "--", *VERB, env=env, code=255, cwd=tmp_path)
  done = pod("install", *POD, env=env, code=1, cwd=tmp_path)
  assert "Not all hosts confirm the installation" in done.stderr


def test_an_installation_that_no_host_confirms_is_repeated(gcloud, tmp_path):
  qr = "queued-resources"
  env = gcloud([0], skips=[[qr, "scp"], [qr, "ssh"]])
  pod("up", *POD, "--", *VERB, env=env, cwd=tmp_path)
  assert logged(tmp_path)[0] == ["create", *PREPARED, *PREPARED, "run", "log", "delete"]


def test_an_environment_that_reached_no_host_is_copied_again(gcloud, tmp_path):
  env = gcloud([0], skips=[["queued-resources", "r1:distill.env"]]) | {"HF_TOKEN": "x"}
  pod("up", *POD, "--env=HF_TOKEN", "--", *VERB, env=env, cwd=tmp_path)
  assert logged(tmp_path)[0].count("scp") == 4


def test_runs_that_stop_soon_again_and_again_end_the_launcher(gcloud, tmp_path):
  done = pod("up", *POD, "--", *VERB, env=gcloud([75, 75, 75]), code=75, cwd=tmp_path)
  assert "train exited with code 75 3 times in a row, within 20 minutes each" in done.stderr
  steps, _ = logged(tmp_path)
  assert (steps.count("run"), steps[-2:]) == (3, ["log", "delete"])


def test_commands_that_fail_once_are_retried(gcloud, tmp_path):
  qr, log = "queued-resources", ["tpu-vm", "sed "]
  fails = [[qr, "list"], [qr, "create"], [qr, "scp"], [qr, "ssh"], log, [qr, "delete"]]
  pod("up", *POD, "--", *VERB, env=gcloud([0], fails), cwd=tmp_path)
  steps, _ = logged(tmp_path)
  tried = ["create", "create", "scp", *PREPARED[:2], *PREPARED]
  assert steps == [*tried, "run", "log", "log", "delete", "delete"]


@pytest.mark.parametrize(
  "step, words, tried",
  [
    ("create", "r1 could not be created: gcloud exited with code 1", 3),
    ("scp", "keeps failing. The slices exist and cost money until you run `delete`", 3),
  ],
)
def test_commands_that_keep_failing_end_the_launcher(gcloud, tmp_path, step, words, tried):
  fails = [["queued-resources", step]] * 9
  done = pod("up", *POD, "--", *VERB, env=gcloud([], fails), code=1, cwd=tmp_path)
  assert words in done.stderr
  assert logged(tmp_path)[0].count(step) == tried


def test_any_other_failure_stops_and_keeps_only_the_logs(gcloud, tmp_path):
  done = pod("up", *POD, "--", *VERB, env=gcloud([2]), code=2, cwd=tmp_path)
  assert "train exited with code 2. Its output is above and in logs/r1." in done.stderr
  assert logged(tmp_path)[0][-2:] == ["log", "delete"]
  assert "hello" in (tmp_path / "logs/r1/r1.log").read_text()


@pytest.mark.parametrize("slices", [1, 2])
def test_a_slice_whose_run_made_progress_is_kept(gcloud, tmp_path, slices):
  """Only the first of several hosts prints how far the run is."""
  flags = [*POD, f"--num_slices={slices}"]
  done = pod("up", *flags, "--", *VERB, env=gcloud(["progressed"]), code=2, cwd=tmp_path)
  assert "r1 is kept, because the run had made progress" in done.stderr
  assert "delete" not in logged(tmp_path)[0]


def test_a_slice_whose_logs_do_not_come_back_is_kept(gcloud, tmp_path):
  env = gcloud([2], fails=[["tpu-vm", "sed "]] * 3)
  done = pod("up", *POD, "--", *VERB, env=env, code=2, cwd=tmp_path)
  assert "r1 is kept, because its logs are incomplete" in done.stderr
  assert "delete" not in logged(tmp_path)[0]


def test_variables_reach_the_hosts_in_a_file_and_in_no_command(gcloud, tmp_path):
  env = gcloud([0]) | {"HF_TOKEN": "hf_'secret"}
  pod("up", *POD, "--env=HF_TOKEN", "--", *VERB, env=env, cwd=tmp_path)
  assert "secret" not in (tmp_path / "log.jsonl").read_text()
  memory = json.loads((tmp_path / "memory.json").read_text())
  assert memory["env"] == f"export HF_TOKEN={shlex.quote(env['HF_TOKEN'])}\n"
  assert not list(tmp_path.glob(".r1.*.env"))
  unset = pod("up", *POD, "--env=NOT_SET", "--dry_run", "--", *VERB, code=2)
  assert "--env is NOT_SET; expected a variable that is set here" in unset.stderr


def test_the_account_of_the_slices(gcloud):
  flags = ["--service_account=me@p.example", "--env=HOME", "--dry_run"]
  printed = pod("up", *POD, *flags, "--", *VERB, env=gcloud([])).stdout
  assert printed.startswith("# distill.env on the hosts: HOME\n")
  assert "--service-account=me@p.example" in printed
  assert "DPkg::Lock::Timeout=600" in printed and "ulimit -n" in printed


@pytest.mark.parametrize(
  "words, message",
  [
    (["--workdir=runs/x"], "--workdir is 'runs/x'; expected a URL such as gs://BUCKET/FOLDER"),
    (["--workdir", "runs/x"], "--workdir is 'runs/x'; expected a URL such as gs://BUCKET/FOLDER"),
    (URLS[:1], "train.records is 'retargeted/qwen2'; expected a URL such as gs://BUCKET/NAME"),
  ],
)
def test_files_of_this_machine_are_refused(words, message):
  flags = [flag for flag in POD if flag != "--shared_disk"]
  train = ["train", "--config=configs/r1_qwen_7b.py", *words]
  assert message in pod("up", *flags, "--dry_run", "--", *train, code=2).stderr


def test_urls_and_files_of_the_repository_are_accepted():
  flags = [flag for flag in POD if flag != "--shared_disk"]
  train = ["train", "--config=configs/r1_qwen_7b.py", *URLS]
  pod("up", *flags, "--dry_run", "--", *train, "--config.data.tokenizer=README.md")


def test_commands_without_accelerators_are_refused():
  flags = [flag for flag in POD if flag != "--shared_disk"]
  words = ["filter", "--config=configs/r1_sft_qwen_7b.py", "--workdir=gs://b/f"]
  assert "filter does not use accelerators" in pod("up", *flags, "--", *words, code=2).stderr


def test_every_value_is_one_argument_of_the_command(gcloud, tmp_path):
  """Runs the remote command in a shell, with a fake distill-jax."""
  env = gcloud(["unreached"])
  pod("run", *POD, "--", *VERB, env=env, code=255, cwd=tmp_path)
  _, [words] = logged(tmp_path)
  command = next(w for w in words if w.startswith("--command=")).removeprefix("--command=")
  folder = shlex.split(command)[4]
  home = tmp_path / "home"
  (home / folder / ".venv" / "bin").mkdir(parents=True)
  show = f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n"
  executable(home / folder / ".venv" / "bin" / "distill-jax", show)
  done = run(["bash", "-c", command], cwd=home)
  log = (home / "distill.log").read_text()
  assert json.loads(log) == [*VERB, "--distributed=auto"]
  assert done.stdout == f"{log}distill-exit 0\n"
  assert not list(tmp_path.rglob("x"))


def test_a_dry_run_prints_the_commands_and_runs_none(gcloud, tmp_path):
  printed = pod("up", *POD, "--spot", "--dry_run", "--", *VERB, env=gcloud([])).stdout
  lines = [shlex.split(line) for line in printed.splitlines()]
  assert [line[0] for line in lines] == [
    "gcloud",
    "git",
    *["gcloud"] * 6,
  ]
  assert lines[0][3:6] == ["queued-resources", "create", "r1"]
  assert {"--type=v5p", "--topology=2x2x2", "--spot", "--zone=us-east5-a"} <= set(lines[0])
  assert not (tmp_path / "log.jsonl").exists()


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--name=r1; rm", "--zone=z9", "--topology=v5p:2x2x2"], "is not a valid name"),
    (["--name=r1", "--zone=$(id)", "--topology=v5p:2x2x2"], "is not a valid name"),
    (["--name=r1", "--zone=z9", "--topology=v9:2x2"], "expected CHIP:SHAPE with one of the chips"),
    (["--name=r1", "--zone=z9", "--topology=v5p:3x3x3"], "expected v5p with one of the shapes"),
    (["--name=r1", "--zone=z9", "--topology=tpu7x:2x2x1"], "Use launch/gke.py"),
    (
      ["--name=r1", "--zone=z9", "--topology=v5p:2x2x2", "--num_slices=0"],
      "--num_slices is 0; expected at least 1",
    ),
  ],
)
def test_bad_flags_of_a_pod_raise(flags, words):
  assert words in pod("up", *flags, "--dry_run", "--", "train", code=2).stderr


def test_bad_commands_of_a_pod_raise():
  assert "There is nothing to run" in pod("up", *POD, "--dry_run", code=2).stderr
  assert "line break" in pod("up", *POD, "--dry_run", "--", "a\nb", code=2).stderr


def test_the_scripts_have_help():
  for text in (
    run([sys.executable, "launch/tpu_pod.py", "--help"]).stdout,
    gke("--help").stdout,
  ):
    assert text.startswith("usage: ") and "--topology" in text
  run(["bash", "-n", "launch/slurm.sbatch"])
