"""Runs a command on TPU slices of a GKE cluster, as a JobSet (launch/gke_jobset.yaml).

  python launch/gke.py --name=r1 --image=REGISTRY/distill:1 --topology=v5p:4x4x4 --spot \\
      [--num_slices=2] [--queue=multislice-queue] [--dry_run] -- \\
      train --config=configs/r1_qwen_7b.py --workdir=gs://BUCKET/r1 \\
      --config.train.records=gs://BUCKET/qwen2 --config.train.heldout=gs://BUCKET/qwen2/heldout

launch/Dockerfile builds the image: distill-jax on its PATH and this repository as its working
folder. --queue is a Kueue queue; clusters created by xpk have multislice-queue. A pod that is
preempted or exits with code 75 is started again and resumes from its last checkpoint, without a
limit: Kubernetes only waits longer each time. Exit code 2 ends the JobSet, and so does `kubectl
delete jobset NAME`, which also frees a name that is in use.

The workdir and everything that the command reads must be at URLs, which is checked (--shared_disk
skips the check). --secret names a Kubernetes secret, whose entries become environment variables,
e.g. HF_TOKEN; --service_account names a Kubernetes account with access to the object store
(Workload Identity). Models, records and checkpoints are streamed, so a pod asks for 20 GB of disk.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from distill_jax import cli, flags
from distill_jax.errors import InputError, bad_value
from distill_jax.preflight import addresses, chips

ROOT = Path(__file__).parent.parent
TEMPLATE = Path(__file__).with_name("gke_jobset.yaml")
# Labels of node pools: docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
ACCELERATORS = {
  "v4": "tpu-v4-podslice",
  "v5e": "tpu-v5-lite-podslice",
  "v5p": "tpu-v5p-slice",
  "v6e": "tpu-v6e-slice",
  "tpu7x": "tpu7x",
}
NAME = r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?"  # a DNS label, even with the suffixes of the pods


class Text(str):
  """A string from the command line, always written with double quotes in the YAML."""


class Dumper(yaml.SafeDumper):
  """A YAML writer that supports Text."""


Dumper.add_representer(
  Text, lambda d, text: d.represent_scalar("tag:yaml.org,2002:str", str(text), style='"')
)


def hosts(topology: str, chips_per_host: int) -> int:
  """Returns the number of hosts in a slice.

  Raises:
    InputError: The topology is not listed, or it does not consist of hosts with this many chips.
  """
  chip, count = chips.parse(topology)
  flat = chip.name in ("v5e", "v6e")
  if chips_per_host == 4 or (flat and chips_per_host == count == 8):
    n, rest = divmod(count, chips_per_host)
    if not rest:
      return n
  single = ", or 8 for a slice with one host" if flat else ""
  expected = f"4{single}, for the {count} chips of {topology}"
  raise bad_value("--chips_per_host", chips_per_host, expected, "Correct it")


def render(args: argparse.Namespace) -> str:
  """Returns the JobSet as YAML. Each value is written as one scalar, with any characters in it."""
  n = hosts(args.topology, args.chips_per_host)
  chip, _, grid = args.topology.partition(":")
  jobset: dict[str, Any] = yaml.safe_load(TEMPLATE.read_text())
  jobset["metadata"]["name"] = Text(args.name)
  if args.namespace:
    jobset["metadata"]["namespace"] = Text(args.namespace)
  if args.queue:
    jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = Text(args.queue)
  jobset["spec"]["failurePolicy"]["maxRestarts"] = args.max_restarts
  [slices] = jobset["spec"]["replicatedJobs"]
  slices["replicas"] = args.num_slices
  job = slices["template"]["spec"]
  job["parallelism"] = job["completions"] = n
  pod = job["template"]["spec"]
  pod["nodeSelector"] |= {
    "cloud.google.com/gke-tpu-accelerator": Text(ACCELERATORS[chip]),
    "cloud.google.com/gke-tpu-topology": Text(grid),
  }
  if args.spot:
    pod["nodeSelector"]["cloud.google.com/gke-spot"] = Text("true")
    pod["tolerations"].append(
      {"key": "cloud.google.com/gke-spot", "operator": "Exists", "effect": "NoSchedule"}
    )
  if args.service_account:
    pod["serviceAccountName"] = Text(args.service_account)
  if args.num_slices > 1:  # the network of the host is the fast one between slices
    pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
  [main] = pod["containers"]
  if args.secret:
    main["envFrom"] = [{"secretRef": {"name": Text(args.secret)}}]
  main["image"] = Text(args.image)
  # Kubernetes replaces $(NAME) in arguments, and $$ by $.
  main["args"] = [Text(word.replace("$", "$$")) for word in (*args.verb, "--distributed=auto")]
  for kind in ("requests", "limits"):
    main["resources"][kind]["google.com/tpu"] = args.chips_per_host
  return yaml.dump(jobset, Dumper=Dumper, sort_keys=False, width=float("inf"))


def main(argv: list[str] | None = None) -> None:
  """Creates the JobSet with kubectl, or prints it."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
  parser.add_argument("--name", required=True)
  parser.add_argument("--image", required=True)
  parser.add_argument("--topology", required=True, help="topology of a slice, e.g. v5p:4x4x4")
  parser.add_argument("--num_slices", type=int, default=1)
  parser.add_argument("--chips_per_host", type=int, default=4)
  parser.add_argument("--spot", action="store_true", help="use node pools of spot machines")
  parser.add_argument("--namespace", default="", help="default: the namespace of kubectl")
  parser.add_argument("--queue", default="", help="name of a Kueue queue")
  parser.add_argument("--secret", default="", help="name of a secret with environment variables")
  parser.add_argument("--service_account", default="", help="default: that of the namespace")
  parser.add_argument("--shared_disk", action="store_true", help="all pods share local paths")
  parser.add_argument("--max_restarts", type=int, default=10)
  parser.add_argument("--dry_run", action="store_true", help="only print the JobSet")
  parser.add_argument("verb", nargs="+", help="after --: a verb and its flags")
  args = parser.parse_args(argv)
  for flag in ("name", "namespace", "queue", "secret", "service_account"):
    value = getattr(args, flag)
    if value and not re.fullmatch(NAME, value):
      expected = "at most 40 lower-case letters, digits and -"
      parser.error(str(bad_value(f"--{flag}", value, expected, "Choose another name")))
  if not re.fullmatch(r"[a-z0-9][\w.:/@+-]*", args.image, re.ASCII):
    parser.error(str(bad_value("--image", args.image, "the name of an image", "Correct it")))
  if odd := [word for word in args.verb if not word.isprintable()]:
    parser.error(f"The argument {odd[0]!r} contains a line break or control character. Remove it.")
  if args.num_slices < 1:
    parser.error(str(bad_value("--num_slices", args.num_slices, "at least 1", "Correct it")))
  if args.max_restarts < 0:
    parser.error(str(bad_value("--max_restarts", args.max_restarts, "at least 0", "Correct it")))
  try:
    if not args.shared_disk:
      config = cli.parse(["distill-jax", *args.verb[1:]])
      addresses.check(args.verb[0], flags.WORKDIR.value or "", config, ROOT)
    jobset = render(args)
  except InputError as error:
    parser.error(str(error))
  if args.dry_run:
    print(f"# kubectl apply -f -\n{jobset}", end="")
    return
  sys.exit(subprocess.run(["kubectl", "apply", "-f", "-"], input=jobset, text=True).returncode)


if __name__ == "__main__":
  main()
