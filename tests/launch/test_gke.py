"""launch/gke.py and its template: a valid JobSet, whose values are passed unchanged."""

import json
import os

import pytest
import yaml
from launcher import ROOT, VERB, executable, gke

# What the CustomResourceDefinition of jobset.x-k8s.io/v1alpha2 (kubernetes-sigs/jobset,
# config/components/crd/bases, made from api/jobset/v1alpha2/jobset_types.go) and Kubernetes'
# batch/v1 and core/v1 OpenAPI schemas list as `required`, on the way to a container.
JOB = ("spec", "replicatedJobs", 0, "template", "spec")
RULES = (*JOB, "podFailurePolicy", "rules")
POD = (*JOB, "template", "spec")
REQUIRED = {
  (): ("apiVersion", "kind", "metadata", "spec"),
  ("metadata",): ("name",),
  ("spec",): ("replicatedJobs",),
  ("spec", "failurePolicy", "rules", 0): ("name", "action"),
  ("spec", "replicatedJobs", 0): ("name", "template"),
  JOB: ("template",),
  (*JOB, "podFailurePolicy"): ("rules",),
  (*RULES, 0): ("action",),
  (*RULES, 0, "onExitCodes"): ("operator", "values"),
  (*RULES, 1, "onPodConditions", 0): ("type", "status"),
  POD: ("containers",),
  (*POD, "containers", 0): ("name",),
}
GKE = ["--name=r1", "--image=registry.example/distill:1", "--dry_run", "--shared_disk"]


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
    ("tpu7x:4x4x4", [], 16, "tpu7x"),
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
  assert asked_for["requests"] == asked_for["limits"] | {"ephemeral-storage": "20Gi"}


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


def test_secrets_and_the_account_reach_the_pods():
  flags = ["--secret=keys", "--service_account=reader"]
  spec = job(rendered("--topology=v5p:2x2x2", *flags))["template"]["spec"]
  assert spec["serviceAccountName"] == "reader"
  assert spec["containers"][0]["envFrom"] == [{"secretRef": {"name": "keys"}}]


def test_only_several_slices_use_the_network_of_the_hosts():
  one, two = (
    job(rendered("--topology=v5p:2x2x2", f"--num_slices={n}"))["template"]["spec"] for n in (1, 2)
  )
  assert "hostNetwork" not in one and two["hostNetwork"] is True


def test_a_local_workdir_is_refused():
  flags = [flag for flag in GKE if flag != "--shared_disk"] + ["--topology=v5p:2x2x2"]
  train = ["train", "--config=configs/r1_qwen_7b.py", "--workdir=runs/x"]
  assert "--workdir is 'runs/x'; expected a URL" in gke(*flags, "--", *train, code=2).stderr
