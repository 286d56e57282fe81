"""The verdicts on the samples of a segment, a file of the workdir until the run ends.

It takes about 150 bytes per sample, and about 550 more for each kept one with `near_duplicates`.

Axes: N, the kept samples; P, the parts of a signature.
"""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from distill_jax.errors import InputError
from distill_jax.runtime import files

Counts = dict[str, Counter[str]]  # by the name of the filter: {reason: number of samples}
SIGNATURES = "signatures_"


@dataclasses.dataclass(frozen=True)
class Verdicts:
  """The verdicts on the lines of a range of samples, in order.

  Attributes:
    source: What was judged: the range, the version of its file, and the filters.
    counts: The numbers of rejected samples.
    count: The number of lines.
    patches: One line of JSON per line of the range: {"add": the fields that the filters add,
      "rejected": the reason, if it is rejected}.
    prompts: A hash of each prompt, uint64.
    kept_N: The number of the line, int32. This and the following are empty without comparing
      filters.
    kept_prompts_N: A hash of the prompt, uint64.
    names: A line of text per kept sample.
    signatures: The signatures [N, P], by the name of the comparing filter.
  """

  source: str
  counts: Counts
  count: int
  patches: bytes
  prompts: np.ndarray
  kept_N: np.ndarray
  kept_prompts_N: np.ndarray
  names: bytes
  signatures: dict[str, np.ndarray]

  def rejected(self) -> int:
    """Returns the number of rejected lines."""
    return sum(counts.total() for counts in self.counts.values())

  def write(self, path: str) -> None:
    """Writes a file of verdicts."""
    arrays = {SIGNATURES + name: x for name, x in self.signatures.items()}
    arrays |= {key: getattr(self, key) for key in ("prompts", "kept_N", "kept_prompts_N")}
    about = {"source": self.source, "counts": self.counts, "count": self.count}
    blobs = {"about": json.dumps(about).encode(), "patches": self.patches, "names": self.names}
    arrays |= {name: np.frombuffer(blob, np.uint8) for name, blob in blobs.items()}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    files.write(path, buffer.getvalue())


def read(path: str) -> Verdicts:
  """Returns the verdicts in a file.

  Raises:
    InputError: The file does not exist or is damaged.
  """
  data = files.read(path)
  try:
    with np.load(io.BytesIO(data)) as file:
      arrays = {name: file[name] for name in file.files}
    about = json.loads(arrays.pop("about").tobytes())
    counts = {name: Counter(by) for name, by in about.pop("counts").items()}
    patches, names = (arrays.pop(name).tobytes() for name in ("patches", "names"))
    prefix = len(SIGNATURES)
    keys = [key for key in arrays if key.startswith(SIGNATURES)]
    signatures = {key[prefix:]: arrays.pop(key) for key in keys}
    return Verdicts(
      **about, counts=counts, patches=patches, names=names, signatures=signatures, **arrays
    )
  except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as e:
    raise InputError(f"{path} is damaged ({e}). Delete it and run filter again.") from e


def join(source: str, parts: Sequence[Verdicts]) -> Verdicts:
  """Returns the verdicts on neighbouring ranges as one."""
  counts = add_counts(part.counts for part in parts)
  starts = np.cumsum([0, *(part.count for part in parts)])
  kept = [part.kept_N + np.int32(start) for part, start in zip(parts, starts, strict=False)]
  signatures = {
    name: np.concatenate([part.signatures[name] for part in parts if len(part.kept_N)] or [first])
    for name, first in parts[0].signatures.items()
  }
  return Verdicts(
    source=source,
    counts=counts,
    count=int(starts[-1]),
    patches=b"".join(part.patches for part in parts),
    prompts=np.concatenate([part.prompts for part in parts]),
    kept_N=np.concatenate(kept),
    kept_prompts_N=np.concatenate([part.kept_prompts_N for part in parts]),
    names=b"".join(part.names for part in parts),
    signatures=signatures,
  )


def add_counts(all_counts: Iterable[Counts]) -> Counts:
  """Returns sums of counts."""
  total: Counts = {}
  for counts in all_counts:
    for name, by in counts.items():
      total.setdefault(name, Counter()).update(by)
  return total
