"""Files that a command needs on every host of a pod."""

import pytest

from distill_jax import config
from distill_jax.errors import InputError
from distill_jax.preflight import addresses

pytestmark = pytest.mark.smoke


def empty():
  """A config without any file."""
  c = config.base()
  c.teacher.shape = c.student.shape = "tiny"
  return c


@pytest.mark.parametrize(
  ("verb", "key"), [("record", "records.student_tokenizer"), ("train", "retarget.tokenizer")]
)
def test_the_students_tokenizer_is_on_every_host(verb, key, tmp_path):
  c = empty()
  section, _, name = key.partition(".")
  c[section][name] = "hub:a/b"
  addresses.check([verb], config.resolve(c), tmp_path)
  c[section][name] = str(tmp_path / "tokenizer.json")
  with pytest.raises(InputError, match=rf"{key} is .*; expected a URL such as gs://BUCKET/NAME"):
    addresses.check([verb], config.resolve(c), tmp_path)


def test_retarget_needs_no_accelerator(tmp_path):
  with pytest.raises(InputError, match="retarget does not use accelerators. Run it on one machine"):
    addresses.check(["retarget"], config.resolve(empty()), tmp_path)
