"""Reading a store needs numpy and array_record: no jax, no tensorflow_datasets, no grain."""

import subprocess
import sys
import textwrap

import numpy as np
from tiny_store import sequence

HEAVY = (
  "jax",
  "flax",
  "optax",
  "grain",
  "tensorflow_datasets",
  "google.protobuf",
  "fsspec",
  "etils",
)


def test_a_store_is_read_where_jax_and_tensorflow_datasets_do_not_import(whole):
  code = f"""
    import sys

    class Refuse:
      def find_spec(self, name, path=None, target=None):
        if name in {HEAVY!r}:
          raise ImportError(f"{{name}} was imported")

    sys.meta_path.insert(0, Refuse())
    import distill_jax as dj

    store = dj.open_store({str(whole)!r})
    store.verify()
    print(len(store), store[2]["tokens_T"].tolist())
    import pickle
    assert pickle.loads(pickle.dumps(store))[3].keys() == store[3].keys()
  """
  command = [sys.executable, "-c", textwrap.dedent(code)]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  count, _, tokens = done.stdout.strip().partition(" ")
  assert count == "10"
  np.testing.assert_array_equal(np.array(eval(tokens)), sequence(2)["tokens_T"])
