"""Writes sums whose answers are running totals, for configs/running_sums.py.

  python tools/running_sums.py runs/running_sums

A prompt is "17+25+8+31=", and its answer "42 50 81": each total contains the errors of those before
it, so a model that generates its own totals meets texts that no correct answer has. The script
writes

  tokenizer/        a tokenizer with one token per character, and a chat template
  corpus.jsonl      60,000 chats with correct answers, for the teacher
  practice.jsonl    8,000 prompts with their answers, for the students
  validation.jsonl  200 prompts, to choose the learning rates
  heldout.jsonl     500 prompts, to measure

It always writes the same problems, all of which are different.
"""

import argparse
import itertools
import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models

NUMBERS, LARGEST = 5, 20  # numbers in a sum, from 2 to LARGEST
SIZES = {"corpus": 60_000, "practice": 8_000, "validation": 200, "heldout": 500}
EOS = "<eos>"
TEMPLATE = (
  "{% for message in messages %}{% if message.role == 'user' %}{{ message.content }}{% else %}"
  "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)


def write_tokenizer(folder: Path) -> None:
  """Writes tokenizer.json and tokenizer_config.json."""
  tokens = [EOS, *"0123456789+= "]
  tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
  tokenizer.add_special_tokens([EOS])
  tokenizer.decoder = decoders.Fuse()
  folder.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(folder / "tokenizer.json"))
  config = {"eos_token": EOS, "chat_template": TEMPLATE}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))


def problems(rng: random.Random) -> list[tuple[int, ...]]:
  """Returns as many different problems as are written."""
  made: dict[tuple[int, ...], None] = {}
  while len(made) < sum(SIZES.values()):
    made[tuple(rng.randint(2, LARGEST) for _ in range(NUMBERS))] = None
  return list(made)


def line(numbers: tuple[int, ...], as_chat: bool) -> dict:
  """Returns a problem as a chat with its answer, or as a prompt with its answer key."""
  prompt = "+".join(map(str, numbers)) + "="
  totals = [str(total) for total in itertools.accumulate(numbers)][1:]
  if not as_chat:
    return {"prompt": prompt, "answer": totals[-1]}
  user = {"role": "user", "content": prompt}
  return {"messages": [user, {"role": "assistant", "content": " ".join(totals)}]}


def main(folder: Path) -> None:
  """Writes all files into `folder`."""
  write_tokenizer(folder / "tokenizer")
  made = iter(problems(random.Random(0)))
  for name, count in SIZES.items():
    rows = [line(numbers, name == "corpus") for numbers in itertools.islice(made, count)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("folder", type=Path, help="the folder to write")
  main(parser.parse_args().folder)
