"""`distill-jax help`, --version and completion: generated, complete, and fast."""

import subprocess
import sys
import time

import pytest

from distill_jax import __version__, cli, config, config_reference, registry
from distill_jax.commands import completion
from distill_jax.commands import help as help_command
from distill_jax.errors import InputError


def printed(capsys, *words):
  cli.main(["distill-jax", *words])
  return capsys.readouterr().out


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",), ("help", "--help")])
def test_the_overview_has_every_verb_and_flag(words, capsys):
  text = printed(capsys, *words)
  for verb in registry.names("commands"):
    assert f"\n  {verb} " in text
  for flag in ("config", "workdir", "json", "distributed", "topology"):
    assert f"--{flag} " in text


def test_version(capsys):
  assert printed(capsys, "--version") == f"{__version__}\n"


@pytest.mark.parametrize("verb", sorted(set(registry.names("commands")) - set(cli.WITHOUT_CONFIG)))
def test_a_verb_is_explained(verb, capsys):
  text = printed(capsys, "help", verb)
  assert printed(capsys, verb, "--help") == text
  for block in ("\nReads: ", "\nWrites: ", "\nConfig: ", "\nExample:\n  distill-jax "):
    assert block in text
  for section in help_command.verb_sections(verb):
    assert f"\n{section}" in text or f"\n[{section}]" in text


def test_a_key_has_its_type_default_and_meaning(capsys):
  assert printed(capsys, "help", "seed").startswith("seed: int = 0\n    Seed of all")
  text = printed(capsys, "help", "optim.peak_lr")
  assert text.startswith("optim.peak_lr: float = 0.0003\n")
  assert printed(capsys, "help", "--config.optim.peak_lr=1") == text
  assert printed(capsys, "help", "peak_lr").startswith(text.rstrip())


def test_a_section_and_an_entry(capsys):
  section = printed(capsys, "help", "optim")
  assert section.startswith("[optim]\n")
  assert section.count("\noptim.") == len(config_reference.fields_of(config.OptimOptions))
  entry = printed(capsys, "help", "kd")
  assert entry == printed(capsys, "help", "losses.kd")
  assert "losses.kd.temperature: number or schedule = 1.0" in entry
  assert 'config.loss("kd"' in entry
  assert "\n  mixture " in printed(capsys, "help", "losses")
  assert "filters.math.box_only: bool = False" in printed(capsys, "help", "filters.math")
  assert "NAME" in printed(capsys, "help", "links")


def test_every_word_that_completion_offers_is_explained():
  for key in config_reference.all_keys():
    assert key.dotted in help_command.explain(key.dotted)


@pytest.mark.parametrize(
  "word, near",
  [("train.stpes", "train.steps"), ("recrod", "record"), ("temprature", "temperature")],
)
def test_a_misspelt_word_is_refused_with_the_nearest(word, near, capsys):
  with pytest.raises(SystemExit) as stop:
    cli.main(["distill-jax", "help", word])
  assert stop.value.code == 2
  assert f"Did you mean {near}" in capsys.readouterr().err


@pytest.mark.parametrize(
  "word, key",
  [
    ("lr", "optim.peak_lr: float = 0.0003"),
    ("learning_rate", "optim.peak_lr: float = 0.0003"),
    ("beta", "losses.kd.parameters: dict[str, float] = {}"),
  ],
)
def test_a_word_of_the_meanings_finds_its_keys(word, key, capsys):
  text = printed(capsys, "help", word)
  assert text.startswith(f"{word!r} is not a key. These keys have it in their names or meanings:")
  assert f"\n{key}\n" in text


def test_help_imports_no_jax_and_is_fast():
  """0.1 s on an idle machine; here others may be running."""
  program = "import sys; from distill_jax import cli; cli.main(['distill-jax', *sys.argv[1:]]); "
  program += "assert not {'jax', 'flax', 'numpy', 'absl'} & set(sys.modules)"
  times = []
  for words in (["--help"], ["--version"], ["help", "train"]):
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", program, *words], check=True, stdout=subprocess.DEVNULL)
    times.append(time.perf_counter() - start)
  assert min(times) < 1


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell):
  script = completion.answer([shell])
  assert "--config.optim.peak_lr=" in script
  assert "preflight" in script
  with pytest.raises(InputError, match="expected 'bash' or 'zsh'"):
    completion.answer(["fish"])


COMPLETE = """
eval "$1"
compopt() { :; }
COMP_LINE="$2" COMP_POINT=${#2} COMP_WORDS=($2)
COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
_distill_jax
echo "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
  "line, found",
  [
    ("distill-jax tra", "train"),
    ("distill-jax train --config.optim.pea", "--config.optim.peak_lr="),
    ("distill-jax help losses.kd.te", "losses.kd.temperature losses.kd.teacher"),
  ],
)
def test_bash_completes(line, found):
  command = ["bash", "-c", COMPLETE, "bash", completion.answer(["bash"]), line]
  assert subprocess.run(command, capture_output=True, text=True).stdout.strip() == found
