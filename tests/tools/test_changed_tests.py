"""tools/changed_tests.py: which files are changed, and which tests run for them."""

import subprocess

import changed_tests
import pytest

pytestmark = pytest.mark.smoke

TESTS = {
  "tests/test_config.py": "import tiny\n",
  "tests/nn/test_fused_head.py": "import jax\n",
  "tests/nn/test_fused_head_sharding.py": "from tiny import SEQ_LEN\n",
  "tests/nn/test_remat.py": "import tiny_images\n",
  "tests/records/test_store.py": "",
  "tests/tools/test_bench.py": "",
}
HEAD = {"tests/nn/test_fused_head.py", "tests/nn/test_fused_head_sharding.py"}
NN = HEAD | {"tests/nn/test_remat.py"}


@pytest.mark.parametrize(
  "path, want",
  [
    ("distill_jax/nn/fused_head.py", HEAD),
    ("distill_jax/nn/layers.py", NN),
    ("distill_jax/config.py", {"tests/test_config.py"}),
    ("distill_jax/cli.py", set()),
    ("tools/bench.py", {"tests/tools/test_bench.py"}),
    ("tests/nn/test_remat.py", {"tests/nn/test_remat.py"}),
    ("tests/tiny.py", {"tests/test_config.py", "tests/nn/test_fused_head_sharding.py"}),
    ("tests/conftest.py", set(TESTS)),
    ("tests/records/conftest.py", {"tests/records/test_store.py"}),
    ("README.md", set()),
  ],
)
def test_the_tests_of_a_file(path, want):
  assert changed_tests.tests_of(path, list(TESTS), TESTS.__getitem__) == want


def test_files_that_differ_from_the_branch_point(tmp_path):
  def git(*args):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *who, *args], cwd=tmp_path, check=True, capture_output=True)

  def commit(name, text):
    (tmp_path / name).write_text(text)
    git("add", "-A")
    git("commit", "-qm", name)

  git("init", "-q", "-b", "main")
  commit("same", "1")
  commit("edited", "1")
  git("checkout", "-qb", "branch")
  commit("committed", "1")
  git("checkout", "-q", "main")
  commit("of main", "1")
  git("checkout", "-q", "branch")
  (tmp_path / "edited").write_text("2")
  (tmp_path / "new").write_text("1")
  assert sorted(changed_tests.changed_files(tmp_path)) == ["committed", "edited", "new"]
