"""Bytes, requests, minutes and dollars of the steps from a corpus to an exported student.

  python tools/run_costs.py

prints the tables of docs/costs.md. Each step is a formula of sizes and of the constants below. The
constants marked "measured" were measured on this project's machine of two cores (docs/costs.md has
the commands); those marked "assumed" are list prices and the speeds of cloud machines.
"""

from __future__ import annotations

import dataclasses

CHIP_HOUR = 4.20  # dollars, v5p on demand; assumed
CORE_HOUR = 0.05  # dollars, general-purpose machines; assumed
READ_REQUEST = 0.0004 / 1000  # dollars, Google Cloud Storage class B; assumed
WRITE_REQUEST = 0.005 / 1000  # dollars, class A; assumed
HOST_RATE = 1e9  # bytes/s between one host and the store, 32 requests in flight; assumed
CHIPS_PER_HOST = 4

STREAM_BYTES = 8 * 2**20  # a request of a corpus or a piece of a tensor
PART_BYTES = 16 * 2**20  # a request of an upload
RECORD_BYTES = 31.5  # per token, 63 samples; the estimate of `preflight` for R1
PACKED_BYTES = 1.9  # per token; measured (tools/bench/pack.py)
CORPUS_BYTES = 4.73  # per token; measured (tools/bench/pack.py)
PACK_SECONDS = 1.1e-6  # core seconds per token; measured (tools/bench/pack.py)
PACK_SERIAL = 0.1e-6  # seconds per token that only one process can do; measured
RETARGET_SECONDS = 17e-6  # core seconds per token, to Llama's tokenizer; measured
FILTER_SECONDS = 0.072  # core seconds per sample of 5,000 tokens with filters of r1_sft: the limit
STATE_BYTES = 12  # per parameter in a checkpoint: float32 value and two moments
MINUTES_PER_CHECKPOINT = 10


@dataclasses.dataclass(frozen=True)
class Cost:
  """The cost of one step.

  Attributes:
    read: Bytes read from the store by all machines together.
    written: Bytes written.
    reads: Read requests.
    writes: Write requests.
    hours: Hours of the machines.
    dollars: Machines and requests.
  """

  read: float
  written: float
  reads: float
  writes: float
  hours: float
  machine_dollars_per_hour: float

  @property
  def dollars(self) -> float:
    machines = self.hours * self.machine_dollars_per_hour
    return machines + self.reads * READ_REQUEST + self.writes * WRITE_REQUEST


def pack(tokens: float, cores: int) -> Cost:
  """Returns the cost of packing a corpus on one machine."""
  read, written = tokens * CORPUS_BYTES, tokens * PACKED_BYTES
  seconds = tokens * max(PACK_SECONDS / cores, PACK_SERIAL)
  files = 4 * tokens / 2**20  # shard, index, note and place
  reads = read / STREAM_BYTES
  return Cost(read, written, reads, files, seconds / 3600, cores * CORE_HOUR)


def record(tokens: float, row: int, weights: float, chip_hours: float, chips: int) -> Cost:
  """Returns the cost of recording a teacher whose rows are each held by two hosts."""
  hosts, rows, shards = chips // CHIPS_PER_HOST, tokens / row, tokens / 2**18
  read = weights + 2 * tokens * PACKED_BYTES
  start = weights / hosts / HOST_RATE
  reads = weights / STREAM_BYTES + 2 * rows
  hours = chip_hours / chips + start / 3600
  return Cost(read, tokens * RECORD_BYTES, reads, 3 * shards, hours, chips * CHIP_HOUR)


def retarget(tokens: float, cores: int) -> Cost:
  """Returns the cost of converting records to another tokenizer on one machine."""
  size, shards = tokens * RECORD_BYTES, tokens / 2**18
  hours = tokens * RETARGET_SECONDS / cores / 3600
  reads = size / STREAM_BYTES + shards
  writes = 4 * shards  # records, index, note and statistics
  return Cost(size, size, reads, writes, hours, cores * CORE_HOUR)


def train(
  tokens: float, epochs: int, row: int, parameters: float, chip_hours: float, chips: int
) -> Cost:
  """Returns the cost of training on records; each host reads the rows of its devices."""
  hosts, shards = chips // CHIPS_PER_HOST, tokens / 2**18
  hours = chip_hours / chips
  saves = hours * 60 / MINUTES_PER_CHECKPOINT
  read = epochs * tokens * RECORD_BYTES + hosts * 16 * tokens / row + 2 * parameters
  reads = epochs * tokens / row + hosts * shards + 2 * parameters / STREAM_BYTES
  written = saves * STATE_BYTES * parameters
  return Cost(read, written, reads, written / STREAM_BYTES, hours, chips * CHIP_HOUR)


def filter_samples(samples: float, tokens_each: float, cores: int) -> Cost:
  """Returns the cost of filtering generated samples on one machine."""
  text = samples * tokens_each * CORPUS_BYTES
  hours = samples * FILTER_SECONDS / cores / 3600
  return Cost(text, text, text / STREAM_BYTES, text / 64e6, hours, cores * CORE_HOUR)


def export(parameters: float, machines: int, dollars_per_hour: float) -> Cost:
  """Returns the cost of exporting float32 parameters as bfloat16."""
  read, written = 4 * parameters, 2 * parameters
  hours = (read + written) / machines / HOST_RATE / 3600
  reads, writes = read / STREAM_BYTES, written / PART_BYTES
  return Cost(read, written, reads, writes, hours, machines * dollars_per_hour)


def steps() -> dict[str, Cost]:
  """Returns the costs of the steps from R1's corpus to exported students, by name."""
  corpus, seq_len = 2**32, 4096
  pod_host = CHIPS_PER_HOST * CHIP_HOUR
  return {
    "pack R1's corpus (16 cores)": pack(corpus, 16),
    "record R1 (v5p:4x4x4)": record(corpus, seq_len, 688e9, 217, 64),
    "retarget to Qwen's tokenizer (16 cores)": retarget(corpus, 16),
    "train 7B (v5p:4x4x4)": train(corpus, 2, seq_len, 7.6e9, 308, 64),
    "train 70B (v5p:4x4x8)": train(corpus, 2, seq_len, 70.6e9, 3005, 128),
    "filter 800,000 samples (16 cores)": filter_samples(800_000, 5_000, 16),
    "export 7B (16 hosts)": export(7.6e9, 16, pod_host),
    "export 70B (16 hosts)": export(70.6e9, 16, pod_host),
    "export 70B (one machine of 4 cores)": export(70.6e9, 1, 4 * CORE_HOUR),
  }


def table() -> str:
  """Returns the costs as a table in Markdown."""
  lines = [
    "| step | read | written | read requests | write requests | minutes | dollars |",
    "|---|---:|---:|---:|---:|---:|---:|",
  ]
  for name, cost in steps().items():
    lines.append(
      f"| {name} | {cost.read / 1e9:,.0f} GB | {cost.written / 1e9:,.0f} GB | {cost.reads:,.0f} | "
      f"{cost.writes:,.0f} | {cost.hours * 60:,.1f} | {cost.dollars:,.2f} |"
    )
  return "\n".join(lines)


if __name__ == "__main__":
  print(table())
