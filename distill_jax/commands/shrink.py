"""`shrink`: a smaller student out of a teacher, as a Hugging Face folder; or the search for one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distill_jax.commands import _shrink_search
from distill_jax.config import Config
from distill_jax.errors import InputError
from distill_jax.pruning import shapes
from distill_jax.pruning.students import Teacher
from distill_jax.pruning.table import text  # noqa: F401
from distill_jax.runtime import distributed, json_io

RESULT = "shrink.json"


def run(config: Config, workdir: Path) -> dict[str, Any]:
  """Makes config.teacher smaller as config.shrink says, and writes shrink.json into `workdir`.

  With a target, several shapes near it are made and distilled a little, and one recommended:
  see shrinking/search.py. What is finished is not done again.

  Returns: what shrink.json holds: `dir`; `kept`, by axis; `factorised`, by matrix; and of
    `models` (teacher, student, and random: the student's shape with random weights)
    parameters, bytes in shrink.dtype, and ce, the held-out cross-entropy in nats a token.

  Raises:
    InputError: a shape that the family cannot have, a target that no shape meets, data that
      does not fit; before anything is measured.
  """
  s = config.shrink
  if (workdir / RESULT).exists():  # finished before
    return json.loads((workdir / RESULT).read_text())
  asked = [k for k in ("layers", *shapes.SIZES, "factorise", "window") if getattr(s, k)]
  targets = [k for k in _shrink_search.TARGETS if getattr(s, k)]
  if len(targets) > 1 or bool(targets) == bool(asked):
    raise InputError(
      f"shrink sets {', '.join(targets + asked) or 'nothing'}; set sizes, such as shrink.layers, "
      f"or one of {', '.join(_shrink_search.TARGETS)}"
    )
  if targets:
    result = _shrink_search.search(config, workdir, targets[0])
  else:
    result = Teacher(config).make(s, s.dir or str(workdir / "model"))
  distributed.run_on_process_0(lambda: json_io.write_json(workdir / RESULT, result))
  return result
