"""The launchers: their commands, values that must not be run as code, and preemption."""

import contextlib
import importlib.util
import io
import json
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import yaml

ROOT = Path(__file__).parents[2]
NASTY = [
  "a b",
  "$(touch x)",
  "`touch x`",
  "; touch x",
  "'",
  '"',
  "&& touch x",
  "$HOME",
  "*",
  "#",
  "a: b",
  "",
  "\\",
  "!!",
  "ü",
]
VERB = ["train", "--config=configs/r1_qwen_7b.py", *[f"--config.data.path={v}" for v in NASTY]]
POD = ["--name=r1", "--zone=us-east5-a", "--topology=v5p:2x2x2", "--poll=0"]


def run(line, env=None, code=0, cwd=ROOT):
  done = subprocess.run(
    [str(x) for x in line],
    capture_output=True,
    text=True,
    cwd=cwd,
    env=os.environ | (env or {}),
    timeout=60,
  )
  assert done.returncode == code, done.stdout + done.stderr
  return done


def launcher(name):
  """A script's main(), called here as its command would be: a start of jax is slow."""
  spec = importlib.util.spec_from_file_location(name, ROOT / f"launch/{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)

  def call(*flags, env=None, code=0, cwd=ROOT):
    out, err, ended = io.StringIO(), io.StringIO(), 0
    with (
      contextlib.chdir(cwd),
      mock.patch("tempfile.tempdir", str(cwd)),  # where the archive goes
      mock.patch.dict(os.environ, env or {}),
      contextlib.redirect_stdout(out),
      contextlib.redirect_stderr(err),
    ):
      try:
        module.main([str(f) for f in flags])
      except SystemExit as e:
        ended = e.code
        if isinstance(ended, str):  # as the interpreter does
          print(ended, file=sys.stderr)
          ended = 1
    done = subprocess.CompletedProcess(flags, ended or 0, out.getvalue(), err.getvalue())
    assert done.returncode == code, done.stdout + done.stderr
    return done

  return call


pod, gke = launcher("tpu_pod"), launcher("gke")


def executable(path: Path, text: str) -> Path:
  path.write_text(text)
  path.chmod(path.stat().st_mode | stat.S_IXUSR)
  return path


# ------------------------------------------------------------------ queued resources

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
  if code == "preempted":
    memory["nodes"][max(memory["nodes"])] = "PREEMPTED"
    leave(255)
  if code == "suspended":
    memory["state"] = "SUSPENDED"
    leave(1)
  leave(code)
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
  lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
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
  said = pod("up", *POD, "--spot", "--dry_run", "--", *VERB, env=gcloud([])).stdout
  lines = [shlex.split(line) for line in said.splitlines()]
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
  run([sys.executable, "launch/tpu_pod.py", "--help"])
  run([sys.executable, "launch/gke.py", "--help"])
  run(["bash", "-n", "launch/slurm.sbatch"])


# ------------------------------------------------------------------ GKE

# What the CustomResourceDefinition of jobset.x-k8s.io/v1alpha2 (kubernetes-sigs/jobset,
# config/components/crd/bases, made from api/jobset/v1alpha2/jobset_types.go) and Kubernetes'
# batch/v1 and core/v1 OpenAPI schemas list as `required`, on the way to a container.
REQUIRED = {
  (): ("apiVersion", "kind", "metadata", "spec"),
  ("metadata",): ("name",),
  ("spec",): ("replicatedJobs",),
  ("spec", "failurePolicy", "rules", 0): ("name", "action"),
  ("spec", "replicatedJobs", 0): ("name", "template"),
  ("spec", "replicatedJobs", 0, "template", "spec"): ("template",),
  ("spec", "replicatedJobs", 0, "template", "spec", "podFailurePolicy"): ("rules",),
  ("spec", "replicatedJobs", 0, "template", "spec", "podFailurePolicy", "rules", 0): ("action",),
  (
    "spec",
    "replicatedJobs",
    0,
    "template",
    "spec",
    "podFailurePolicy",
    "rules",
    0,
    "onExitCodes",
  ): ("operator", "values"),
  (
    "spec",
    "replicatedJobs",
    0,
    "template",
    "spec",
    "podFailurePolicy",
    "rules",
    1,
    "onPodConditions",
    0,
  ): ("type", "status"),
  ("spec", "replicatedJobs", 0, "template", "spec", "template", "spec"): ("containers",),
  ("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0): ("name",),
}
GKE = ["--name=r1", "--image=registry.example/distill:1", "--dry_run"]


def rendered(*flags):
  return yaml.safe_load(gke(*GKE, *flags, "--", *VERB).stdout)


def job(jobset):
  return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]


def test_the_jobset_has_what_its_schema_requires():
  jobset = rendered("--topology=v5p:4x4x4", "--num_slices=2", "--spot", "--queue=multislice-queue")
  for path, fields in REQUIRED.items():
    here = jobset
    for key in path:
      here = here[key]
    assert all(here.get(f) is not None for f in fields), (path, fields)
  assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 2
  assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "multislice-queue"
  # podFailurePolicy wants pods that are not restarted in place.
  assert job(jobset)["template"]["spec"]["restartPolicy"] == "Never"
  rules = job(jobset)["podFailurePolicy"]["rules"]
  assert [(r["action"], r.get("onExitCodes", {}).get("values")) for r in rules] == [
    ("Ignore", [75]),
    ("Ignore", None),
    ("FailJob", [2]),
  ]


@pytest.mark.parametrize(
  "topology, flags, hosts, accelerator",
  [
    ("v5p:4x4x4", [], 16, "tpu-v5p-slice"),
    ("v5e:4x8", [], 8, "tpu-v5-lite-podslice"),
    ("v5e:2x4", ["--chips_per_host=8"], 1, "tpu-v5-lite-podslice"),
    ("v6e:16x16", [], 64, "tpu-v6e-slice"),
    ("v4:2x2x2", [], 2, "tpu-v4-podslice"),
  ],
)
def test_a_pod_for_each_host_of_a_slice(topology, flags, hosts, accelerator):
  jobset = rendered(f"--topology={topology}", *flags)
  assert job(jobset)["parallelism"] == job(jobset)["completions"] == hosts
  pod_spec = job(jobset)["template"]["spec"]
  where = pod_spec["nodeSelector"]
  assert where["cloud.google.com/gke-tpu-accelerator"] == accelerator
  assert where["cloud.google.com/gke-tpu-topology"] == topology.partition(":")[2]
  asked_for = pod_spec["containers"][0]["resources"]
  assert asked_for["requests"] == asked_for["limits"]


def test_every_value_is_one_yaml_scalar():
  """A YAML reader returns each word; $ is doubled, because Kubernetes replaces $(NAME)."""
  jobset = rendered("--topology=v5e:2x2")
  [main] = job(jobset)["template"]["spec"]["containers"]
  assert main["command"] == ["distill-jax"]
  assert main["args"] == [w.replace("$", "$$") for w in [*VERB, "--distributed=auto"]]
  tricky = ["yes", "1e3", "null", "- a", "{a: b}", "a: &b *b", "!!python/object:os.system", "~"]
  text = gke(*GKE, "--topology=v5e:2x2", "--", "train", *tricky).stdout
  assert '- "1e3"\n' in text  # to kubectl's reader a number, were it bare
  assert job(yaml.safe_load(text))["template"]["spec"]["containers"][0]["args"][1:-1] == tricky


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--topology=v5p:4x4x4", "--chips_per_host=8"], "--chips_per_host is 8; expected 4"),
    (["--topology=v5x:4x4"], "expected CHIP:SHAPE with one of the chips"),
    (["--topology=v5e:2x2", "--queue=a: b"], "--queue is 'a: b'"),
    (["--topology=v5e:2x2", "--num_slices=0"], "--num_slices is 0; expected at least 1"),
  ],
)
def test_bad_flags_of_a_jobset_raise(flags, words):
  assert words in gke(*GKE, *flags, "--", "train", code=2).stderr


@pytest.mark.parametrize(
  "flag, words, verb",
  [
    ("--image=a b", "expected the name of an image", "train"),
    ("--image=a\nb", "expected the name of an image", "train"),
    ("--name=r1\nspec: x", "lower-case letters", "train"),
    ("--namespace=$(id)", "lower-case letters", "train"),
    ("--spot", "line break", "a\nb"),
  ],
)
def test_bad_names_raise(flag, words, verb):
  assert words in gke(*GKE, "--topology=v5e:2x2", flag, "--", verb, code=2).stderr


def test_all_placeholders_of_the_template_are_replaced():
  jobset = json.dumps(rendered("--topology=v5e:2x2", "--spot"))
  for word in ("NAME", "IMAGE", "TOPOLOGY", "ACCELERATOR", "VERB"):
    assert word in (ROOT / "launch/gke_jobset.yaml").read_text()
    assert f'"{word}"' not in jobset


def test_the_jobset_is_passed_to_kubectl(tmp_path):
  executable(
    tmp_path / "kubectl", f'#!/bin/sh\necho "$@" > {tmp_path}/args; cat > {tmp_path}/in; exit 3\n'
  )
  flags = [f for f in GKE if f != "--dry_run"]
  env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
  gke(*flags, "--topology=v5e:2x2", "--", *VERB, env=env, code=3)
  assert (tmp_path / "args").read_text() == "apply -f -\n"
  assert yaml.safe_load((tmp_path / "in").read_text()) == rendered("--topology=v5e:2x2")


# ------------------------------------------------------------------ Slurm


def slurm(tmp_path, code, *words, env=None, expect=0):
  """Runs the script with fake srun and scontrol."""
  show = (
    f"#!{sys.executable}\nimport json, pathlib, sys\n"
    f"pathlib.Path({str(tmp_path)!r}, '{{name}}').write_text(json.dumps(sys.argv[1:]))\n"
    "sys.exit({code})\n"
  )
  executable(tmp_path / "srun", show.format(name="srun.json", code=code))
  executable(tmp_path / "scontrol", show.format(name="scontrol.json", code=0))
  path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", **(env or {})}
  return run(["bash", ROOT / "launch/slurm.sbatch", *words], env=path, code=expect)


def test_slurm_passes_arguments_and_requeues_a_stopped_run(tmp_path):
  slurm(tmp_path, 75, *VERB)
  said = json.loads((tmp_path / "srun.json").read_text())
  assert said == ["--kill-on-bad-exit=0", "distill-jax", *VERB, "--distributed=auto"]
  assert json.loads((tmp_path / "scontrol.json").read_text()) == ["requeue", "7"]


@pytest.mark.parametrize("code", [0, 1, 2])
def test_slurm_exits_with_the_code_of_the_run(tmp_path, code):
  slurm(tmp_path, code, *VERB, expect=code)
  assert not (tmp_path / "scontrol.json").exists()


def test_slurm_dry_run(tmp_path):
  said = slurm(tmp_path, 0, *VERB, env={"DRY_RUN": "1"}).stdout
  assert not (tmp_path / "srun.json").exists()
  words = run(["bash", "-c", f"printf '%s\\0' {said.strip()}"]).stdout.split("\0")[:-1]
  assert words == ["srun", "--kill-on-bad-exit=0", "distill-jax", *VERB, "--distributed=auto"]
  assert "There is nothing to run" in slurm(tmp_path, 0, expect=2).stderr
