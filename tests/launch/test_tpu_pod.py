"""launch/tpu_pod.py with a gcloud that fails and preempts."""

import json
import os
import shlex
import sys

import pytest
from json_lines import read_lines
from launcher import VERB, executable, gke, pod, run

# The paths of VERB are on no host.
POD = ["--name=r1", "--zone=us-east5-a", "--topology=v5p:2x2x2", "--poll=0", "--shared_disk"]
URLS = ["--workdir=gs://b/r1", "--config.train.records=('gs://b/records',)"]
URLS += ["--config.train.heldout=('gs://b/records/heldout',)"]


GCLOUD = """#!{python}
import json, pathlib, sys
here = pathlib.Path({here!r})
with (here / "log.jsonl").open("a") as f:
  f.write(json.dumps(sys.argv[1:]) + "\\n")
words = sys.argv[3:]
memory = json.loads((here / "memory.json").read_text())
def leave(code=0):
  (here / "memory.json").write_text(json.dumps(memory))
  sys.exit(code)
if memory["fails"] and words[:2] == memory["fails"][0]:
  memory["fails"].pop(0)
  leave(1)
count = [w.partition("=")[2] for w in words if w.startswith("--node-count=")]
if words[1] == "create":
  memory["state"] = "ACTIVE"
  names = ["r1-%d" % i for i in range(int(count[0]))] if count else ["r1"]
  memory["nodes"] = dict.fromkeys(names, "READY")
elif words[1] == "delete":
  memory["state"] = None
elif words[:2] == ["queued-resources", "list"]:
  rented = [{{"name": "x/other", "state": {{"state": "SUSPENDED"}}}}]
  rented += [{{"name": "x/r1", "state": {{"state": memory["state"]}}}}] if memory["state"] else []
  print(json.dumps(rented))
elif words[:2] == ["tpu-vm", "list"]:
  print(json.dumps([{{"name": "x/" + n, "state": s}} for n, s in memory["nodes"].items()]))
elif words[1] == "ssh" and any("distill-jax" in w and "exec 9" in w for w in words):
  code = memory["runs"].pop(0)
  if code == "progressed":
    memory["progressed"] = True
    leave(2)
  if code == "preempted":
    memory["nodes"][max(memory["nodes"])] = "PREEMPTED"
    leave(255)
  if code == "suspended":
    memory["state"] = "SUSPENDED"
    leave(1)
  leave(code)
if words[1] == "ssh" and any("grep" in w for w in words):
  leave(0 if memory.get("progressed") else 1)
if words[1] == "scp" and any("distill.env" in w for w in words):
  memory["env"] = pathlib.Path(words[2]).read_text()
leave()
"""


@pytest.fixture
def gcloud(tmp_path):
  """A fake gcloud on the PATH that logs its arguments and simulates a slice."""

  def make(runs, fails=()):
    folder = tmp_path / "bin"
    folder.mkdir()
    executable(folder / "gcloud", GCLOUD.format(python=sys.executable, here=str(tmp_path)))
    memory = {"state": None, "nodes": {}, "runs": runs, "fails": fails}
    (tmp_path / "memory.json").write_text(json.dumps(memory))
    return {"PATH": f"{folder}:{os.environ['PATH']}"}

  return make


def logged(tmp_path):
  lines = read_lines(tmp_path / "log.jsonl")
  what = lambda words: words[3] if words[2] == "queued-resources" else words[2]
  return [what(words) for words in lines if words[3] != "list"], lines


def test_a_preempted_and_stopped_pod_continues_to_the_end(gcloud, tmp_path):
  """Preempted once, stopped once (exit code 75), then finished: logs downloaded, slices deleted."""
  pod("up", *POD, "--", *VERB, env=gcloud(["preempted", 75, 0]), cwd=tmp_path)
  steps, _ = logged(tmp_path)
  assert steps == [
    "create",
    "scp",
    "ssh",
    "ssh",  # created, installed, run
    "delete",
    "create",
    "scp",
    "ssh",
    "ssh",  # preempted: anew
    "scp",
    "ssh",
    "ssh",  # 75: the same again
    "ssh",
    "delete",
  ]
  assert (tmp_path / "logs" / "r1").is_dir()


def test_one_of_two_slices_is_preempted(gcloud, tmp_path):
  env = gcloud(["preempted", "suspended", 0])
  pod("up", *POD, "--num_slices=2", "--keep", "--", *VERB, env=env, cwd=tmp_path)
  steps, lines = logged(tmp_path)
  assert (steps.count("create"), steps.count("delete"), steps[-1]) == (3, 2, "ssh")
  [made, *_] = [words for words in lines if words[3] == "create"]
  assert {"--node-count=2", "--node-prefix=r1"} <= set(made)


def test_a_lost_connection_does_not_end_the_run(gcloud, tmp_path):
  """The slice still exists: it is not deleted, and the launcher waits for the same run again."""
  pod("up", *POD, "--keep", "--", *VERB, env=gcloud([255, 255, 0]), cwd=tmp_path)
  steps, _ = logged(tmp_path)
  assert steps == ["create", *["scp", "ssh", "ssh"] * 3, "ssh"]


def test_commands_that_fail_once_are_retried(gcloud, tmp_path):
  qr = "queued-resources"
  fails = [[qr, "list"], [qr, "create"], [qr, "scp"], [qr, "ssh"], [qr, "ssh"], [qr, "delete"]]
  pod("up", *POD, "--", *VERB, env=gcloud([0], fails), cwd=tmp_path)
  steps, _ = logged(tmp_path)
  assert steps == [
    "create",
    "create",
    "scp",
    "scp",
    "ssh",
    "ssh",
    "ssh",
    "ssh",
    "ssh",
    "delete",
    "delete",
  ]


@pytest.mark.parametrize(
  "step, words, tried",
  [
    ("create", "was created 3 times but was never ready", 3),
    ("scp", "keeps failing. The slices exist and cost money until you run `delete`", 3),
  ],
)
def test_commands_that_keep_failing_end_the_launcher(gcloud, tmp_path, step, words, tried):
  fails = [["queued-resources", step]] * 9
  done = pod("up", *POD, "--", *VERB, env=gcloud([], fails), code=1, cwd=tmp_path)
  assert words in done.stderr
  assert logged(tmp_path)[0].count(step) == tried


def test_any_other_failure_stops_with_the_log(gcloud, tmp_path):
  done = pod("up", *POD, "--", *VERB, env=gcloud([2]), code=2, cwd=tmp_path)
  assert "train exited with code 2. Its log is above" in done.stderr
  steps, lines = logged(tmp_path)
  assert steps[-1] == "delete"
  assert any("tail -n 50" in word for line in lines for word in line)


def test_a_slice_whose_run_made_progress_is_kept(gcloud, tmp_path):
  done = pod("up", *POD, "--", *VERB, env=gcloud(["progressed"]), code=2, cwd=tmp_path)
  assert "r1 is kept, because the run had made progress" in done.stderr
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


def test_the_disk_and_the_account_of_the_slices(gcloud):
  flags = ["--boot_disk=500", "--service_account=me@p.example", "--env=HOME", "--dry_run"]
  printed = pod("up", *POD, *flags, "--", *VERB, env=gcloud([])).stdout
  assert printed.startswith("# distill.env on the hosts: HOME\n")
  assert "--boot-disk=disk-size=500 --service-account=me@p.example" in printed
  assert "DPkg::Lock::Timeout=600" in printed and "ulimit -n" in printed


@pytest.mark.parametrize(
  "words, message",
  [
    (["--workdir=runs/x"], "--workdir is 'runs/x'; expected a URL such as gs://BUCKET/FOLDER"),
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
  env = gcloud([0])
  pod("run", *POD, "--", *VERB, env=env, cwd=tmp_path)
  _, [words] = logged(tmp_path)
  command = next(w for w in words if w.startswith("--command=")).removeprefix("--command=")
  folder = shlex.split(command)[4]
  home = tmp_path / "home"
  (home / folder / ".venv" / "bin").mkdir(parents=True)
  show = f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n"
  executable(home / folder / ".venv" / "bin" / "distill-jax", show)
  done = run(["bash", "-c", command], cwd=home)
  assert json.loads(done.stdout) == [*VERB, "--distributed=auto"]
  assert (home / "distill.log").read_text() == done.stdout
  assert not list(tmp_path.rglob("x"))


def test_a_dry_run_prints_the_commands_and_runs_none(gcloud, tmp_path):
  printed = pod("up", *POD, "--spot", "--dry_run", "--", *VERB, env=gcloud([])).stdout
  lines = [shlex.split(line) for line in printed.splitlines()]
  assert [line[0] for line in lines] == [
    "gcloud",
    "git",
    "gcloud",
    "gcloud",
    "gcloud",
    "mkdir",
    "gcloud",
    "gcloud",
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
