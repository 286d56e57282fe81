"""launch/slurm.sbatch: arguments, exit codes, and a stopped run that is queued again."""

import json
import os
import sys

import pytest
from launcher import ROOT, VERB, executable, run


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
  words = json.loads((tmp_path / "srun.json").read_text())
  cpus = "--cpus-per-task=1"
  assert words == ["--kill-on-bad-exit=0", cpus, "distill-jax", *VERB, "--distributed=auto"]
  assert json.loads((tmp_path / "scontrol.json").read_text()) == ["requeue", "7"]


@pytest.mark.parametrize("code", [0, 1, 2])
def test_slurm_exits_with_the_code_of_the_run(tmp_path, code):
  slurm(tmp_path, code, *VERB, expect=code)
  assert not (tmp_path / "scontrol.json").exists()


def test_slurm_dry_run(tmp_path):
  printed = slurm(tmp_path, 0, *VERB, env={"DRY_RUN": "1"}).stdout
  assert not (tmp_path / "srun.json").exists()
  words = run(["bash", "-c", f"printf '%s\\0' {printed.strip()}"]).stdout.split("\0")[:-1]
  assert words[:2] == ["srun", "--kill-on-bad-exit=0"]
  assert words[3:] == ["distill-jax", *VERB, "--distributed=auto"]
  assert "There is nothing to run" in slurm(tmp_path, 0, expect=2).stderr


def test_the_processes_of_a_node_share_its_cores(tmp_path):
  env = {"SLURM_CPUS_ON_NODE": "96", "SLURM_NTASKS_PER_NODE": "4"}
  slurm(tmp_path, 0, *VERB, env=env)
  assert "--cpus-per-task=24" in json.loads((tmp_path / "srun.json").read_text())


@pytest.mark.parametrize("flag", [["--workdir=/scratch/r1"], ["--workdir", "/scratch/r1"]])
def test_several_nodes_need_a_shared_workdir(tmp_path, flag):
  nodes = {"SLURM_JOB_NUM_NODES": "4"}
  refused = slurm(tmp_path, 0, "train", *flag, env=nodes, expect=2)
  assert "--workdir is '/scratch/r1'; expected a URL" in refused.stderr
  assert not (tmp_path / "srun.json").exists()
  slurm(tmp_path, 0, "train", *flag, env=nodes | {"SHARED_DISK": "1"})
  slurm(tmp_path, 0, "train", "--workdir=gs://b/r1", env=nodes)
