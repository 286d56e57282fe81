"""The exact projection on the devices, beside an enumeration in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_pair

from distill_jax.cross_tokenizer import chains, dense
from distill_jax.cross_tokenizer.align import align
from distill_jax.cross_tokenizer.project import POINT, TeacherRows
from distill_jax.cross_tokenizer.project import project as project_samples

SEGMENTS = 12


@pytest.fixture(scope="module")
def problem():
  """Random texts of both tokenizers, and the teacher's logits for each of its tokens."""
  rng = np.random.default_rng(0)
  pair = tiny_pair.tables()
  texts = ["".join(rng.choice([*tiny_pair.LETTERS], 40)) for _ in range(SEGMENTS)]
  segments = [[*pair.teacher.tokenizer.encode(text), pair.teacher.end] for text in texts]
  aligned, skipped = align(pair, [np.array(s) for s in segments])
  assert not skipped
  logits_GV = rng.normal(size=(len(aligned.token_G), pair.teacher.size)) * 2
  known = np.append(False, np.diff(aligned.segment_G) == 0) & (rng.random(len(logits_GV)) > 0.05)
  at = np.flatnonzero(known[aligned.g_H])
  return pair, aligned, logits_GV, known, at


@pytest.fixture(scope="module")
def splits(problem):
  return chains.Splits.of(problem[0])


def project(problem, splits, padding=3, min_mass=0.0):
  """The projection on the device, with a head that has some rows of padding."""
  pair, aligned, logits_GV, known, at = problem
  of = chains.chains(pair, splits, aligned, at, known)
  assert not of.cut.any() or chains.DEPTH < 4
  tables = dense.DenseTables.of(pair, splits)
  head_VD = jnp.eye(pair.teacher.size + padding)[:, : pair.teacher.size]
  head_VD = tables.sort_head(head_VD.at[pair.teacher.size :].set(9.0))
  is_token = jnp.arange(len(head_VD)) < pair.teacher.size

  @jax.jit
  def run(hidden_LXD, links, labels_X):
    logits = lambda hidden_XD: jnp.where(is_token[None], hidden_XD @ head_VD.T, -jnp.inf)
    return dense.project(logits, hidden_LXD, links, labels_X, tables, min_mass)

  names = ("place", "real", "split", "base", "low", "high")
  links = dense.Links(**{name: getattr(of, name).T for name in names})
  links = links.replace(place=links.place + 1)
  hidden = jnp.asarray(logits_GV[np.maximum(of.place.T, 0)], jnp.float32)
  return jax.device_get(run(hidden, links, aligned.id_H[at]))


def test_it_is_the_enumeration(problem, splits):
  """To float32: the reference sums the same terms one by one in float64."""
  pair, aligned, logits_GV, known, at = problem
  p_GV = np.exp(logits_GV) / np.exp(logits_GV).sum(-1, keepdims=True)
  reference = tiny_pair.Enumeration(pair, aligned, p_GV, known)
  want, mass, lost = map(np.array, zip(*(reference.target(h) for h in at), strict=True))
  got = project(problem, splits)
  kinds = np.bincount(aligned.kind_of(at), minlength=5)
  assert kinds.min() >= 5, kinds
  np.testing.assert_allclose(got.p_XS, want, rtol=2e-5, atol=2e-7)
  np.testing.assert_allclose(got.lost_X, lost, atol=1e-6)
  assert not got.hard_X.any()
  hard = project(problem, splits, min_mass=0.1)
  np.testing.assert_array_equal(hard.hard_X, mass < 0.1)
  np.testing.assert_array_equal(
    hard.p_XS[hard.hard_X], np.eye(pair.student.size)[aligned.id_H[at]][hard.hard_X]
  )


def draw(p_GV, n, known, rng):
  """n systematic points of each distribution, with independent offsets."""
  ends = np.ceil(n * np.cumsum(p_GV, -1) - rng.random((len(p_GV), 1))).astype(int)
  ends[:, -1] = n
  count_GV = np.diff(np.maximum(ends, 0), prepend=0) * known[:, None]
  g, ids = np.nonzero(count_GV)
  return (
    count_GV[g, ids].astype(np.int32),
    ids.astype(np.int32),
    np.searchsorted(g, np.arange(len(p_GV) + 1)),
  )


def test_projected_samples_agree_with_it_in_the_mean(problem, splits):
  """Tokens that begin with a teacher token are unbiased: the squared error of the mean of R draws
  is 1/R of the variance, up to the noise of some hundred tokens. Inside, the bias is O(1/n)."""
  pair, aligned, logits_GV, known, at = problem
  p_GV = np.exp(logits_GV) / np.exp(logits_GV).sum(-1, keepdims=True)
  exact = project(problem, splits)
  want = np.float64(exact.p_XS)
  real = np.log(p_GV[np.arange(len(p_GV)), aligned.token_G])
  rng, n, R = np.random.default_rng(1), 5, 300
  total, squares, masses = np.zeros_like(want), np.zeros_like(want), np.zeros((3, len(at)))
  for _ in range(R):
    counts, ids, ends = draw(p_GV, n, known, rng)
    rows = TeacherRows(n, ids, counts, ends[:-1], ends[1:], real)
    got = project_samples(pair, aligned, rows, at, 0.0)
    p = np.zeros_like(want)
    p[np.repeat(np.arange(len(at)), np.diff(got.start_X)), got.id_E] = got.weight_E / (n * POINT)
    p /= p.sum(-1, keepdims=True)
    total += p
    squares += p**2
    masses += [got.opened_X, got.beyond_X, got.unresolved_X]
  mean = total / R
  variance = (squares / R - mean**2) * R / (R - 1)
  begins = aligned.offset_H[at] == 0
  error = (mean - want)[begins] ** 2
  assert error.sum() == pytest.approx(variance[begins].sum() / R, rel=0.3)
  for mean_X, exact_X in zip(masses / R, (exact.opened_X, exact.beyond_X), strict=False):
    assert mean_X[begins].mean() == pytest.approx(exact_X[begins].mean(), rel=0.05)
  first_level = masses[2][begins].mean() / R  # and what is unresolved at further levels
  assert exact.unresolved_X[begins].mean() < first_level < 1.3 * exact.unresolved_X[begins].mean()
  inside = ~begins & ~project(problem, splits, min_mass=0.3).hard_X
  assert inside.sum() > 5
  np.testing.assert_allclose(mean[inside], want[inside], atol=0.02)
