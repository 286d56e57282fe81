"""Runs of `generate` against bad_server.py."""

import collections
import json
from pathlib import Path

import tiny
from bad_server import Server

from distill_jax import config
from distill_jax.commands import generate


def made(folder: Path, server: Server, prompts, /, **changes):
  c = tiny.tiny(folder)
  c.teacher.source = ""
  path = folder / "prompts.jsonl"
  lines = (p if isinstance(p, dict) else {"prompt": p, "answer": 7} for p in prompts)
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  c.generate.prompts = str(path)
  c.generate.server.url = server.url
  c.generate.server.timeout_s = 20.0  # longer than any response takes on a busy machine
  c.generate.server.retries = 3
  for name, value in changes.items():
    section = c.generate if hasattr(c.generate, name) else c.generate.server
    setattr(section, name, value)
  return c


def run(c, folder: Path):
  folder.mkdir(exist_ok=True)
  return generate.run(config.resolve(c), folder)


def lines(path: Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def times_asked(server: Server) -> collections.Counter:
  return collections.Counter((prompt, seed) for _, prompt, seed in server.asked)
