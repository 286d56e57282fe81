"""The rival with sorted probabilities: its records, and its loss."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from toy_vocabularies import Toy

from distill_jax.cross_tokenizer.tables import PairTables
from distill_jax.losses import SampledTargets
from distill_jax.types import Batch

TOOLS = Path(__file__).parents[2] / "tools"
TEACHER = Toy(b"a", b"b", b"ab", b"ba")
STUDENT = Toy(b"a", b"b", b"bb", b"aba")
N, T = 12, 5


def load(name):
  path = TOOLS / name
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_counts_are_sorted_and_positions_inside_of_a_token_are_marked():
  """The teacher's a ab ab a a, which the student reads as a aba, b and a a."""
  counts_TV = np.array([[3, 3, 6, 0], [2, 4, 4, 2], [0, 6, 6, 0], [12, 0, 0, 0], [0, 0, 0, 0]])
  row = {
    "tokens_T": np.array([0, 2, 2, 0, 0], np.int32),
    "segments_T": np.ones(T, np.int32),
    "mask_T": np.array([1, 1, 1, 1, 0], bool),
    "ids_TK": np.tile(np.arange(4, dtype=np.int32), (T, 1)),
    "weight_TK": counts_TV / N,
    "label_logp_T": np.full(T, -1.0, np.float32),
  }
  tables = PairTables(TEACHER, STUDENT, {})
  (record,) = load("sorted_records.py").convert(tables, [row], 8, N)
  assert record["tokens_T"][:5].tolist() == [0, 3, 1, 0, 0]
  assert record["mask_T"].tolist() == [True] * 4 + [False] * 4
  ranks = [np.bincount(ids, minlength=4).tolist() for ids in record["ids_TN"][:4]]
  assert ranks == [[6, 3, 3, 0], [0, 0, 0, N], [6, 6, 0, 0], [N, 0, 0, 0]]


def test_uld_is_the_distance_of_sorted_distributions():
  fn = load("rival_losses/uld.py").Loss()
  rng = np.random.default_rng(0)
  z, p = rng.normal(size=(1, 3, 20)), np.sort(rng.dirichlet(np.ones(5), (1, 3)))[..., ::-1].copy()
  ids = np.broadcast_to(np.arange(5), p.shape).copy()
  ids[0, 2] += 15  # a position inside of a token
  targets = SampledTargets(ids_BTK=jnp.asarray(ids), weight_BTK=jnp.asarray(p, jnp.float32))
  batch = Batch(None, jnp.zeros((1, 3), int), jnp.ones((1, 3), bool), {"teacher": targets})
  got = jax.jit(lambda z: fn.token_loss(z, batch, 0))(jnp.asarray(z, jnp.float32))[0]
  q = -np.sort(-np.exp(z) / np.exp(z).sum(-1, keepdims=True))
  want = np.abs(q[..., :5] - p).sum(-1) + q[..., 5:].sum(-1)
  np.testing.assert_allclose(got, [*want[0, :2], 0], rtol=1e-5)
