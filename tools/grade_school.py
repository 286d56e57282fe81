"""Writes one-step word problems with their answers, the prompts of configs/grade_school.py.

  python tools/grade_school.py runs/grade_school

writes train.jsonl (800 problems) and heldout.jsonl (160), with one {"prompt": ..., "answer": ...,
"kind": ...} per line; and train.jsonl in two parts, practice.jsonl (640) and validation.jsonl
(160). It always writes the same problems. A question with the same two numbers is either in the
800 or in the 160 problems.
"""

import argparse
import itertools
import json
import random
from pathlib import Path

NAMES = [
  "Anna",
  "Ben",
  "Carla",
  "David",
  "Emma",
  "Felix",
  "Grace",
  "Henry",
  "Iris",
  "Jack",
  "Kate",
  "Leo",
  "Mia",
  "Noah",
  "Olga",
  "Paul",
  "Rosa",
  "Sam",
  "Tina",
  "Victor",
]
THINGS = [
  "apples",
  "books",
  "coins",
  "pencils",
  "stickers",
  "marbles",
  "cookies",
  "shells",
  "stamps",
  "cards",
  "balloons",
  "oranges",
]
SMALL, LARGE = range(2, 13), range(2, 31)
KINDS = {  # kind: (question, range of x and y, answer)
  "gives": (
    "{a} has {x} {t}. {b} gives {a} {y} more {t}. How many {t} does {a} have now?",
    LARGE,
    lambda x, y: x + y,
  ),
  "together": (
    "{a} has {x} {t} and {b} has {y} {t}. How many {t} do they have together?",
    LARGE,
    lambda x, y: x + y,
  ),
  "days": (
    "{a} finds {x} {t} on Monday and {y} {t} on Tuesday. How many {t} does {a} find in the two "
    "days?",
    LARGE,
    lambda x, y: x + y,
  ),
  "more": (
    "{a} has {x} {t}. {b} has {y} more than {a}. How many {t} does {b} have?",
    LARGE,
    lambda x, y: x + y,
  ),
  "gave": (
    "{a} had {x} {t} and gave {y} of them to {b}. How many {t} does {a} have left?",
    LARGE,
    lambda x, y: x - y,
  ),
  "takes": (
    "There are {x} {t} on the table. {a} takes {y} of them away. How many {t} are still on the "
    "table?",
    LARGE,
    lambda x, y: x - y,
  ),
  "bags": (
    "{a} buys {y} bags with {x} {t} in each bag. How many {t} does {a} buy?",
    SMALL,
    lambda x, y: x * y,
  ),
  "shares": (
    "{a} shares {product} {t} equally among {y} friends. How many {t} does each friend get?",
    SMALL,
    lambda x, y: x,
  ),
}
TRAIN, HELDOUT = 100, 20  # problems of each kind
PRACTICE = 640  # the first problems of train.jsonl


def problems(kind, rng):
  """Yields TRAIN + HELDOUT problems with distinct pairs of numbers."""
  question, numbers, answer = KINDS[kind]
  pairs = [(x, y) for x, y in itertools.product(numbers, numbers) if answer(x, y) > 0]
  for x, y in rng.sample(pairs, TRAIN + HELDOUT):
    a, b = rng.sample(NAMES, 2)
    text = question.format(a=a, b=b, x=x, y=y, product=x * y, t=rng.choice(THINGS))
    yield {"prompt": text, "answer": str(answer(x, y)), "kind": kind}


def main(folder):
  """Writes all files into `folder`."""
  rng = random.Random(0)
  folder.mkdir(parents=True, exist_ok=True)
  all_of = [list(problems(kind, rng)) for kind in KINDS]
  for name, part in (("train", slice(TRAIN)), ("heldout", slice(TRAIN, None))):
    rows = [row for of_kind in all_of for row in of_kind[part]]
    rng.shuffle(rows)
    parts = {"practice": rows[:PRACTICE], "validation": rows[PRACTICE:]} if name == "train" else {}
    for file, some in {name: rows, **parts}.items():
      (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("folder", type=Path, help="the folder to write")
  main(parser.parse_args().folder)
