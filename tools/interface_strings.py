"""Writes the interface strings of GIMP with translations, for configs/translation.py.

  apt-get download gimp-data && dpkg -x gimp-data_*.deb DIR
  python tools/interface_strings.py DIR runs/translation [--language=de]

The translations are under the GPL (version 3 or later); keep the licence with them. The script
writes pairs.jsonl, heldout.jsonl (a tenth of the strings) and tokenizer.model (sentencepiece,
trained on the training pairs). Each line has {"source", "target"}, without the underscores that
mark shortcuts. Strings that differ only in case and punctuation are in the same file.
"""

from __future__ import annotations

import argparse
import gettext
import hashlib
import json
from pathlib import Path

from train_sentencepiece import train_sentencepiece

VOCABULARY = 2_000


def pairs(folder: Path, language: str) -> dict[str, str]:
  """Returns a translation for each English string that has one line."""
  found: dict[str, str] = {}
  for file in sorted(folder.glob(f"usr/share/locale/{language}/LC_MESSAGES/*.mo")):
    with file.open("rb") as f:
      catalog = gettext.GNUTranslations(f)._catalog
    for english, other in catalog.items():
      # A context ends with \x04. The keys of plurals are (text, number).
      if isinstance(english, str) and english and "\n" not in english + other:
        found.setdefault(english.split("\x04")[-1].replace("_", ""), other.replace("_", ""))
  if not found:
    raise SystemExit(f"{folder} does not contain strings in {language!r}. Unpack gimp-data there.")
  return {a: b for a, b in found.items() if a.strip() and b.strip()}


def is_heldout(english: str) -> bool:
  """Returns whether a string is in the held-out tenth, by a hash of its letters and digits."""
  letters = "".join(c for c in english.lower() if c.isalnum())
  return hashlib.sha256(letters.encode()).digest()[0] < 26  # of 256


def main() -> None:
  """Writes the pairs and the tokenizer."""
  args = argparse.ArgumentParser(description=__doc__)
  args.add_argument("folder", type=Path)
  args.add_argument("target", type=Path)
  args.add_argument("--language", default="de")
  given = args.parse_args()
  made = pairs(given.folder, given.language)
  given.target.mkdir(parents=True, exist_ok=True)
  for name, held in (("pairs", False), ("heldout", True)):
    lines = [
      json.dumps({"source": a, "target": b}, ensure_ascii=False) + "\n"
      for a, b in made.items()
      if is_heldout(a) == held
    ]
    (given.target / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{given.target / name}.jsonl: {len(lines):,} pairs")
  texts = [text for pair in made.items() if not is_heldout(pair[0]) for text in pair]
  train_sentencepiece(texts, VOCABULARY, given.target / "tokenizer.model")


if __name__ == "__main__":
  main()
