"""Writes the chapters of six novels by Jane Austen as text files, for tools/ablations.py.

  apt-get download r-cran-janeaustenr && dpkg -x r-cran-janeaustenr_*.deb runs/novels
  pip install rdata==1.1.0
  python tools/novels.py runs/novels

writes NOVEL-CHAPTER.txt into the folder "chapters" of runs/novels. The novels are in the public
domain. In the package, each is a variable of R: a vector of lines.
"""

from __future__ import annotations

import argparse
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import rdata

DATA = Path("usr/lib/R/site-library/janeaustenr/data")
CHAPTER = re.compile(r"chapter \w+\.?", re.IGNORECASE)


def chapters(lines: Sequence[str]) -> Iterator[str]:
  """Yields the texts of the chapters of a novel; skips what precedes the first one.

  Args:
    lines: The lines of the novel. A line with only "Chapter" and a number begins a chapter.
  """
  starts = [i for i, line in enumerate(lines) if CHAPTER.fullmatch(line.strip())]
  for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
    yield "\n".join(lines[start + 1 : end]).strip() + "\n"


def main(folder: Path) -> None:
  """Writes the chapters of all novels of the unpacked Debian package in `folder`."""
  values = (folder / DATA / "Rdata.rdb").read_bytes()
  index = rdata.read_rds(folder / DATA / "Rdata.rdx")
  out = folder / "chapters"
  out.mkdir(exist_ok=True)
  for name, (start, size) in index["variables"].items():
    serialized = zlib.decompress(values[start + 4 : start + size])  # after its length
    lines = rdata.conversion.convert(rdata.parser.parse_data(serialized))
    for i, text in enumerate(chapters([str(line) for line in lines]), start=1):
      (out / f"{name}-{i:02}.txt").write_text(text)


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("folder", type=Path, help="the folder with the unpacked package")
  main(parser.parse_args().folder)
