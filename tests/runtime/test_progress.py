"""Tests of progress reports, with a fake clock."""

import io
import math

import pytest

from distill_jax.runtime.progress import Progress

pytestmark = pytest.mark.smoke


class Clock:
  now = 100.0

  def __call__(self):
    return self.now


@pytest.fixture
def clock():
  return Clock()


def lines(out):
  assert out.getvalue().endswith("\n")
  return out.getvalue().splitlines()


def test_lines_match_examples(clock):
  out = io.StringIO()
  with Progress("record", 65_536, file=out, clock=clock) as p:
    for _ in range(12):
      clock.now += 1.0
      p.add(1024, loss=3.2149)
  assert lines(out) == [
    "record  5,120/65,536 tokens  7%  1,024 tokens/s  left 0m59s  loss 3.21",
    "record  10,240/65,536 tokens  15%  1,024 tokens/s  left 0m54s  loss 3.21",
    "record  12,288/65,536 tokens  18%  1,024 tokens/s  took 0m12s  loss 3.21",
  ]


def test_a_line_can_come_before_the_first_unit(clock):
  out = io.StringIO()
  with Progress("train", 64, "steps", start=16, file=out, clock=clock) as p:
    p.begin("compiles the step")
    clock.now += 4.0
    p.add(48)
  assert lines(out) == [
    "train  16/64 steps  25%  compiles the step",
    "train  64/64 steps  100%  12 steps/s  took 0m04s",
  ]


def test_the_rate_is_that_of_recent_lines(clock):
  out = io.StringIO()
  with Progress("train", 10_000, "steps", file=out, clock=clock) as p:
    clock.now += 600  # compiling
    p.add(1)
    for _ in range(100):
      clock.now += 5
      p.add(50)
  assert "  10 steps/s  left 8m20s" in lines(out)[-2]  # 4,999 steps are left
  assert "  4.55 steps/s  took 18m20s" in lines(out)[-1]  # the mean over all of it


def test_the_rate_of_a_resumed_job_excludes_earlier_work(clock):
  out = io.StringIO()
  with Progress("record", 1000, start=900, file=out, clock=clock) as p:
    clock.now += 10
    p.add(50)
  assert lines(out)[0] == "record  950/1,000 tokens  95%  5 tokens/s  left 0m10s"
  assert lines(out)[-1] == "record  950/1,000 tokens  95%  5 tokens/s  took 0m10s"


def test_numbers_are_read_only_when_printed(clock):
  class Device:
    reads = 0

    def __float__(self):
      Device.reads += 1
      return 1.0

  out = io.StringIO()
  with Progress("train", 100, file=out, clock=clock) as p:
    for _ in range(40):
      clock.now += 1
      p.add(1, loss=Device())
  assert Device.reads == len(lines(out)) == 9


def test_the_last_line_is_printed_after_an_error(clock):
  out = io.StringIO()
  with pytest.raises(KeyError), Progress("train", 10, "steps", file=out, clock=clock) as p:
    clock.now += 3723
    p.add(1, loss=math.nan, lr=1e-4, grad=123456.7)
    raise KeyError
  assert lines(out)[-1].endswith("/s  stopped after 1h02m  loss nan  lr 0.0001  grad 123,457")


def test_zero_time_and_zero_units(clock):
  out = io.StringIO()
  with Progress("record", 0, file=out, clock=clock):
    pass
  assert lines(out) == ["record  0/0 tokens  100%  0 tokens/s  took 0m00s"]
  out = io.StringIO()
  with Progress("record", 5, every=0, file=out, clock=clock) as p:
    p.add(7)  # more than the total, in zero time
  assert "left unknown" in lines(out)[0]


def test_standard_error_plain_and_flushed(capfd):
  with Progress("record", 5, every=0) as p:
    p.add(5)
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("record  5/5 tokens  100%")
    assert err.endswith("\n") and "\r" not in err and "\x1b" not in err


def test_brief_reports_nothing_that_ends_before_the_first_line(clock):
  out = io.StringIO()
  for seconds in (4, 6):
    with Progress("sample", 8, "texts", brief=True, file=out, clock=clock) as p:
      p.add(8)
      clock.now += seconds
  assert lines(out) == ["sample  8/8 texts  100%  1.33 texts/s  took 0m06s"]
  with pytest.raises(ValueError), Progress("sample", 8, brief=True, file=out, clock=clock) as p:
    p.add(2)
    raise ValueError
  assert len(lines(out)) == 2
