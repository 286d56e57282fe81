"""Runs one verb on TPU slices of a GKE cluster, as a JobSet (launch/gke_jobset.yaml).

  python launch/gke.py --name=r1 --image=REGISTRY/distill:1 --topology=v5p:4x4x4 --spot \\
      [--num_slices=2] [--queue=multislice-queue] [--dry_run] -- \\
      train --config=configs/r1_qwen_7b.py --workdir=gs://BUCKET/r1

The image has distill-jax on its PATH and this repository as its working folder. --queue is a
Kueue queue; clusters that xpk made have multislice-queue. What is preempted, or ends with exit
code 75, runs again from its last checkpoint; exit code 2 ends the JobSet. Under a name that is
taken: kubectl delete jobset NAME, first.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from distill_jax.errors import InputError
from distill_jax.preflight import chips

TEMPLATE = Path(__file__).with_name("gke_jobset.yaml")
# Labels of node pools: docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
ACCELERATORS = {
  "v4": "tpu-v4-podslice",
  "v5e": "tpu-v5-lite-podslice",
  "v5p": "tpu-v5p-slice",
  "v6e": "tpu-v6e-slice",
  "tpu7x": "tpu7x",
}
NAME = r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?"  # with the pods' suffixes, a DNS label


class Text(str):
  """What a person gave: always in double quotes, so that no YAML reader sees more in it."""


class Dumper(yaml.SafeDumper):
  pass


Dumper.add_representer(
  Text, lambda d, text: d.represent_scalar("tag:yaml.org,2002:str", str(text), style='"')
)


def hosts(topology: str, chips_per_host: int) -> int:
  """Hosts of a slice.

  Raises:
    InputError: the topology is not listed, or such hosts do not make it up.
  """
  chip, count = chips.parse(topology)
  flat = chip.name in ("v5e", "v6e")
  if chips_per_host == 4 or (flat and chips_per_host == count == 8):
    n, rest = divmod(count, chips_per_host)
    if not rest:
      return n
  raise InputError(
    f"--chips_per_host is {chips_per_host}, and {topology} has {count} chips; slices are of hosts "
    f"of 4{', or of 8 in a slice of one host' if flat else ''}"
  )


def render(args: argparse.Namespace) -> str:
  """The JobSet, by structure: a value is one scalar, whatever is in it."""
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
  [main] = pod["containers"]
  main["image"] = Text(args.image)
  # Kubernetes replaces $(NAME) in arguments, and reads $$ as $.
  main["args"] = [Text(word.replace("$", "$$")) for word in (*args.verb, "--distributed=auto")]
  for kind in ("requests", "limits"):
    main["resources"][kind]["google.com/tpu"] = args.chips_per_host
  return yaml.dump(jobset, Dumper=Dumper, sort_keys=False, width=float("inf"))


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
  parser.add_argument("--name", required=True)
  parser.add_argument("--image", required=True)
  parser.add_argument("--topology", required=True, help="as v5p:4x4x4, a slice")
  parser.add_argument("--num_slices", type=int, default=1)
  parser.add_argument("--chips_per_host", type=int, default=4)
  parser.add_argument("--spot", action="store_true", help="node pools of spot machines")
  parser.add_argument("--namespace", default="", help="left out: kubectl's own")
  parser.add_argument("--queue", default="", help="of Kueue")
  parser.add_argument("--max_restarts", type=int, default=10)
  parser.add_argument("--dry_run", action="store_true", help="print the JobSet, and stop")
  parser.add_argument("verb", nargs="+", help="after --: a verb and its flags")
  args = parser.parse_args(argv)
  for flag in ("name", "namespace", "queue"):
    value = getattr(args, flag)
    if value and not re.fullmatch(NAME, value):
      parser.error(f"--{flag} is {value!r}; it is at most 40 lower-case letters, digits and -")
  if not re.fullmatch(r"[a-z0-9][\w.:/@+-]*", args.image, re.ASCII):
    parser.error(f"--image is {args.image!r}, which is no image's name")
  if odd := [word for word in args.verb if not word.isprintable()]:
    parser.error(f"{odd[0]!r} holds a line break or another control character; take it out")
  if args.num_slices < 1 or args.max_restarts < 0:
    parser.error(f"--num_slices={args.num_slices} --max_restarts={args.max_restarts}: from 1, 0 up")
  try:
    jobset = render(args)
  except InputError as error:
    parser.error(str(error))
  if args.dry_run:
    print(f"# kubectl apply -f -\n{jobset}", end="")
    return
  sys.exit(subprocess.run(["kubectl", "apply", "-f", "-"], input=jobset, text=True).returncode)


if __name__ == "__main__":
  main()
