"""Estimates: bytes of a store, the slowest resource, a program that is too large."""

import dataclasses

import jax
import numpy as np
import pytest
from preflight_config import model_config

from distill_jax import config
from distill_jax.preflight import (
  chips,
  compiler,
  estimate,
  programs,
  roofline,
)
from distill_jax.records import tf_example
from distill_jax.records.recording import planned_manifest


def test_estimated_store_bytes_are_close_to_what_the_codec_writes():
  """12 entries for 63 points with ids from the whole vocabulary, the worst case."""
  rng, T, V = np.random.default_rng(0), 512, 151_936
  about = dataclasses.replace(
    planned_manifest(config.resolve(model_config()).records, V, 1, T), n=63
  )
  count = rng.multinomial(63 - 12, np.ones(12) / 12, T) + 1
  ids = np.sort(rng.integers(0, V, (T, 12)), -1)
  zeros = np.zeros(T, np.float32)
  row = {
    "tokens_T": rng.integers(0, V, T),
    "segments_T": np.ones(T, int),
    "mask_T": np.ones(T, bool),
    "ids_TN": np.stack([np.repeat(i, n) for i, n in zip(ids, count, strict=True)]),
    "argmax_T": ids[np.arange(T), count.argmax(1)],
    "label_logp_T": zeros,
    "entropy_T": zeros,
  }
  written = sum(map(len, tf_example.encode(0, row, about).values())) / T
  assert estimate.record_bytes_per_token(about) == pytest.approx(written, rel=0.15)


def test_the_bound_is_that_of_the_slowest_resource():
  chip = chips.CHIPS["v5p"]
  sent = {"all-gather": int(600e9), "dcn all-reduce": int(6.25e9)}
  b = roofline.bound(chip, 64, 64, {"layers": 459e12 * 64 * 3}, 2.765e12 * 2, sent)
  assert (b.compute, b.hbm, b.ici, b.dcn) == pytest.approx((3, 2, 1, 1))
  assert b.seconds == 3 and b.by == "compute"
  two = roofline.bound(chips.CHIPS["tpu7x"], 4, 8, {}, 0.0, {"all-gather": int(300e9)})
  assert two.ici == pytest.approx(1)  # a chip's two devices share its links


class TooBig:
  def __init__(self, message):
    self.message = message

  def compile(self, compiler_options=None):
    raise jax.errors.JaxRuntimeError(self.message)


def test_a_program_that_is_too_large_is_reported():
  told = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(22.80G) exceeds available HBM (15.75G)."
  )
  memory, compiled = compiler.compile_step(
    programs.LoweredStep(TooBig(told), {"parameters": 2**30}, 4)
  )
  assert compiled is None and memory.peak == int(22.8 * 2**30) == memory.temporaries + 2**30
  with pytest.raises(jax.errors.JaxRuntimeError):
    compiler.compile_step(programs.LoweredStep(TooBig("INTERNAL: something else"), {}, 4))
