"""Runs of `generate` against bad_server.py."""

import collections
from pathlib import Path

import tiny
from bad_server import Server
from json_lines import write_lines

from distill_jax import config
from distill_jax.commands import generate


def made(folder: Path, server: Server, prompts, /, **changes):
  c = tiny.tiny(folder)
  c.teacher.source = ""
  rows = (p if isinstance(p, dict) else {"prompt": p, "answer": 7} for p in prompts)
  c.generate.prompts = str(write_lines(folder / "prompts.jsonl", rows))
  c.generate.server.urls = (server.url,)
  c.generate.server.silence_s = 20.0  # longer than any response takes on a busy machine
  c.generate.server.first_byte_s = 20.0
  c.generate.server.retries = 3
  for name, value in changes.items():
    section = c.generate if hasattr(c.generate, name) else c.generate.server
    setattr(section, name, value)
  return c


def run(c, folder: Path):
  folder.mkdir(exist_ok=True)
  return generate.run(config.resolve(c), folder)


def times_asked(server: Server) -> collections.Counter:
  return collections.Counter((prompt, seed) for _, prompt, seed in server.asked)
