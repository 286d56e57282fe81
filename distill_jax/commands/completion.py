"""Prints a completion script for bash or zsh.

Verbs, flags, config keys and the words of `distill-jax help` are completed.

Example:
  source <(distill-jax completion bash)
"""

from __future__ import annotations

from distill_jax import config_reference
from distill_jax.commands import help as help_command
from distill_jax.errors import bad_value
from distill_jax.registry import ENTRY_CLASSES

BASH = """\
_distill_jax() {{
  local line="${{COMP_LINE:0:COMP_POINT}}" words=()
  local word="${{line##*[[:space:]]}}"
  if [ "$COMP_CWORD" = 1 ]; then
    words=({verbs})
  elif [ "${{COMP_WORDS[1]}}" = help ]; then
    words=({verbs} {keys})
  else
    words=({flags} {settings})
  fi
  local found=($(compgen -W "${{words[*]}}" -- "$word"))
  # "=" and ":" separate words in bash: only what follows the last of them is replaced.
  local done="${{word%"${{word##*[=:]}}"}}"
  COMPREPLY=("${{found[@]#"$done"}}")
  [[ "${{COMPREPLY[*]}}" == *= ]] && compopt -o nospace
  return 0
}}
complete -o default -F _distill_jax distill-jax"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def answer(words: list[str]) -> str:
  """Returns the script for the shell that `words` names.

  Raises:
    InputError: The shell is neither bash nor zsh.
  """
  shell = words[0] if words else ""
  if shell not in ("bash", "zsh"):
    action = "Run `distill-jax completion bash`"
    raise bad_value("the shell", shell, "'bash' or 'zsh'", action)
  keys = [key.dotted for key in config_reference.all_keys() if ".NAME" not in key.dotted]
  plain = [key.dotted for key in config_reference.all_keys() if is_setting(key)]
  script = BASH.format(
    verbs=" ".join(config_reference.entries("commands")),
    keys=" ".join([*keys, *config_reference.sections()]),
    flags=" ".join(f"--{name}=" for name, _ in help_command.flags() if name != "json") + " --json",
    settings=" ".join(f"--config.{key}=" for key in plain),
  )
  return ZSH + script if shell == "zsh" else script


def is_setting(key: config_reference.Key) -> bool:
  """Returns whether a key can be set on the command line without the name of an entry."""
  is_named = ".NAME" in key.dotted or key.dotted.partition(".")[0] in ENTRY_CLASSES
  return key.field.section is None and not is_named
