"""The config of the run in a workdir, as a config file: `--config=config_of_run.py:WORKDIR`."""

from __future__ import annotations

from ml_collections import ConfigDict

from distill_jax import config
from distill_jax.errors import InputError
from distill_jax.runtime import files, json_io


def get_config(workdir: str) -> ConfigDict:
  """Returns the config of the run in a workdir; in another folder, the default of every key."""
  file = files.join(workdir, "config.json")
  if files.info(file) is None:
    return config.base()
  action = "Name a config with --config"
  tree = json_io.read_object(file, action)
  try:
    return ConfigDict(config.to_dict(config.from_dict(tree)))
  except InputError as e:
    raise InputError(f"{file} does not fit this version of distill_jax: {e} {action}.") from e
