"""The shapes of rows and tables for a teacher with another tokenizer than the student's.

Both tokenizers are read, and their tables are made, which takes 2 to 6 seconds. The student's rows
have retarget.seq_len positions. Without it, they are assumed to have as many as the teacher's.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh

from distill_jax.config import Config
from distill_jax.cross_tokenizer.chains import Splits
from distill_jax.cross_tokenizer.dense import DenseTables
from distill_jax.cross_tokenizer.tables import PairTables
from distill_jax.nn import sharding
from distill_jax.records.multi_teacher import MultiTeacherStore
from distill_jax.records.student_rows import StudentRows


def positions(config: Config) -> int:
  """Returns the number of positions of a student's row."""
  return config.retarget.seq_len or config.data.seq_len


def planned_rows(config: Config, store: MultiTeacherStore, tables: PairTables) -> StudentRows:
  """Returns the student's rows of a store that is not recorded yet; they cannot be read."""
  splits = Splits.of(tables)
  return StudentRows(store, tables, splits, positions(config), config.data.seq_len)


def table_shapes(tables: DenseTables, mesh: Mesh) -> DenseTables:
  """Returns the shapes of tables, which are on every device."""
  replicated = sharding.replicated(mesh)

  def shape(x: np.ndarray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated)

  return jax.tree.map(shape, tables)
