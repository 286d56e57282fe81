"""Measures `generate` behind servers at scale: memory, uploads, and what an interruption costs.

  python tools/bench/generate_scale.py [--samples=20000] [--bytes=5000] [--store=gs] [--kills=2]

Two fast stand-in servers stream made-up texts, out of order. The workdir is at an object store on
this machine (see tools/local_stores.py), behind a proxy that counts. The run is ended by kill -9
`--kills` times, at equal distances, and started again. Segments are 4 MB, since 64 MB would be most
of such a run. The last line is a JSON object:

  complete: True if the samples are complete, in order, and their texts those of the servers.
  rss_mb: Memory of the process when a tenth of the samples are finished, and its maximum after it.
  rss_growth: The ratio of the two. 1 means that memory does not grow with the number of samples.
  uploaded_over_samples: Bytes uploaded by all runs over the bytes of the samples; 2 at best.
  uploaded_by_part: The same for each tenth of the samples. Equal numbers mean that uploads are
    linear in what is new.
  asked_again: Requests for samples beyond one each: those in flight at a kill, and those that
    finished in the second before it.
  requests_per_sample: Requests to the object store per sample.
  samples_per_second: Of the whole measurement, with the restarts.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from local_stores import Proxy, Store  # noqa: E402

SAMPLES_PER_PROMPT, IN_FLIGHT, SEGMENT_BYTES = 4, 64, 4 * 2**20
RUN = (
  "from distill_jax import cli\n"
  "from distill_jax.generation import segments\n"
  f"segments.SEGMENT_BYTES = {SEGMENT_BYTES}\n"
  "cli.main()\n"
)


def text_of(prompt: str, seed: int, size: int) -> str:
  """Returns the text of a sample, of `size` bytes, which does not compress well."""
  start = f"{prompt}/{seed}/"
  parts = [hashlib.sha256(f"{start}{i}".encode()).hexdigest() for i in range(size // 64 + 1)]
  return (start + "".join(parts))[:size]


def serve(port: Any, asked: Any, size: int) -> None:
  """Runs one server, which counts the requests for samples in a shared list."""

  async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
      while True:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
          (
            int(line[15:])
            for line in head.lower().split(b"\r\n")
            if line[:15] == b"content-length:"
          ),
          0,
        )
        body = await reader.readexactly(length)
        await (answer(writer, json.loads(body)) if length else models(writer))
    except (asyncio.IncompleteReadError, ConnectionError):
      writer.close()

  async def models(writer: asyncio.StreamWriter) -> None:
    data = json.dumps({"data": [{"id": "big", "owned_by": "bench"}]}).encode()
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data))
    await writer.drain()

  async def answer(writer: asyncio.StreamWriter, body: dict) -> None:
    with asked.get_lock():
      asked.value += 1
    text = text_of(body["prompt"], body["seed"], size)
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    piece = size // 5 + 1
    for i in range(0, size, piece):
      await asyncio.sleep(body["seed"] % 100 / 1000)  # so that samples finish out of order
      event(writer, {"choices": [{"text": text[i : i + piece]}]})
      await writer.drain()
    event(writer, {"choices": [{"text": "", "finish_reason": "stop"}]})
    event(writer, {"choices": [], "usage": {"completion_tokens": size // 4}})
    writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
    await writer.drain()

  def event(writer: asyncio.StreamWriter, value: dict) -> None:
    data = b"data: " + json.dumps(value).encode() + b"\n\n"
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))

  async def main() -> None:
    server = await asyncio.start_server(handle, "127.0.0.1", 0, limit=2**20)
    port.value = server.sockets[0].getsockname()[1]
    await server.serve_forever()

  asyncio.run(main())


class Servers:
  """Two stand-in servers in separate processes; a context manager."""

  def __init__(self, size: int):
    self.asked = multiprocessing.Value("q", 0)
    self._ports = [multiprocessing.Value("i", 0) for _ in range(2)]
    self._processes = [
      multiprocessing.Process(target=serve, args=(port, self.asked, size), daemon=True)
      for port in self._ports
    ]

  def __enter__(self) -> Servers:
    for process in self._processes:
      process.start()
    while not all(port.value for port in self._ports):
      time.sleep(0.01)
    return self

  def __exit__(self, *_: object) -> None:
    for process in self._processes:
      process.terminate()
      process.join()

  @property
  def urls(self) -> tuple[str, ...]:
    """The addresses of the servers."""
    return tuple(f"http://127.0.0.1:{port.value}/v1" for port in self._ports)


def write_config(folder: Path, urls: tuple[str, ...], samples: int) -> Path:
  """Writes the prompts and a config, and returns the config's file."""
  prompts = folder / "prompts.jsonl"
  with prompts.open("w") as f:
    for i in range(samples // SAMPLES_PER_PROMPT):
      f.write(json.dumps({"prompt": f"p{i}", "answer": i}) + "\n")
  path = folder / "scale.py"
  path.write_text(
    "from distill_jax import config\n"
    "def get_config():\n"
    "  c = config.base()\n"
    f"  c.generate.prompts, c.generate.samples = {str(prompts)!r}, {SAMPLES_PER_PROMPT}\n"
    f"  c.generate.server.urls, c.generate.server.in_flight = {urls!r}, {IN_FLIGHT}\n"
    "  return c\n"
  )
  return path


def rss_mb(pid: int) -> float:
  """Returns the memory of a process in MB, or 0 if it has ended."""
  try:
    status = Path(f"/proc/{pid}/status").read_text()
  except OSError:
    return 0.0
  return next((int(x.split()[1]) / 1024 for x in status.splitlines() if "VmRSS" in x), 0.0)


def measure(samples: int, size: int, kind: str, kills: int, folder: Path) -> dict[str, Any]:
  """Runs `generate` to its end, and returns the numbers of the module's docstring."""
  rows: list[tuple[int, float, int]] = []  # (samples asked, memory, bytes uploaded)
  with Store(kind) as store, Proxy(store.port) as proxy, Servers(size) as servers:
    config = write_config(folder, servers.urls, samples)
    command = [sys.executable, "-c", RUN, "generate", f"--config={config}"]
    command += [f"--workdir={store.url}/run", "--json"]
    environment = os.environ | store.environment(proxy.port)
    environment |= {"DISTILL_JAX_CACHE": str(folder / "cache"), "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(ROOT)
    start = time.perf_counter()
    for n in range(kills + 1):
      until = samples * (n + 1) // (kills + 1) if n < kills else 2 * samples
      process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
      output: list[bytes] = []
      reader = threading.Thread(target=lambda p=process, o=output: o.append(p.stdout.read()))
      reader.start()
      while process.poll() is None and servers.asked.value < until:
        rows.append((servers.asked.value, rss_mb(process.pid), proxy.written_bytes))
        time.sleep(0.2)
      if n < kills:
        process.send_signal(signal.SIGKILL)
      process.wait()
      reader.join()
    seconds = time.perf_counter() - start
    assert process.returncode == 0, "generate has failed"
    result = json.loads(output[0].splitlines()[-1])
    rows.append((samples, 0.0, proxy.written_bytes))
    complete, total = check(store, proxy, samples, size)
    requests = len(proxy.requests)
    asked = servers.asked.value
  early = [memory for done, memory, _ in rows if samples / 20 < done <= samples / 10]
  late = [memory for done, memory, _ in rows if done > samples / 10]
  parts = collections.OrderedDict((done * 10 // samples, sent) for done, _, sent in rows)
  steps = [parts.get(i, 0) for i in range(11) if i in parts]
  return {
    "samples": result["samples"],
    "sample_bytes": total // samples,
    "complete": complete,
    "rss_mb": [round(max(early), 1), round(max(late), 1)],
    "rss_growth": round(max(late) / max(early), 3),
    "uploaded_over_samples": round(rows[-1][2] / total, 3),
    "uploaded_by_part": [
      round((b - a) * 10 / total, 2) for a, b in zip(steps, steps[1:], strict=False)
    ],
    "asked_again": asked - samples,
    "requests_per_sample": round(requests / samples, 3),
    "samples_per_second": round(samples / seconds, 1),
  }


def check(store: Store, proxy: Proxy, samples: int, size: int) -> tuple[bool, int]:
  """Returns whether the samples are complete, and their bytes."""
  os.environ.update(store.environment(proxy.port))
  sys.path.insert(0, str(ROOT))
  from distill_jax.data import jsonl
  from distill_jax.runtime import files

  folder, total, count, complete = f"{store.url}/run/samples", 0, 0, True
  for name, info in files.listing(folder, "*.jsonl").items():
    total += info.size
    for line in jsonl.read_lines(files.join(folder, name)):
      row = line.object()
      prompt, sample = divmod(count, SAMPLES_PER_PROMPT)
      text = row["text"]
      complete &= (row["id"], row["sample"]) == (prompt, sample) and len(text) == size
      complete &= text == text_of(*text.split("/")[:2], size) and text.startswith(f"p{prompt}/")
      count += 1
  return complete and count == samples, total


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--samples", type=int, default=20_000)
  parser.add_argument("--bytes", type=int, default=5_000)
  parser.add_argument("--store", choices=("gs", "s3"), default="gs")
  parser.add_argument("--kills", type=int, default=2)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    numbers = measure(args.samples, args.bytes, args.store, args.kills, Path(folder))
  print(json.dumps(numbers))


if __name__ == "__main__":
  main()
