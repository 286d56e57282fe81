"""launch/Dockerfile: what it copies and installs exists. No image is built here."""

import re
import tomllib

from launcher import ROOT

TEXT = (ROOT / "launch/Dockerfile").read_text()


def test_the_copied_files_exist():
  copied = [word for line in re.findall(r"^COPY (.*)$", TEXT, re.M) for word in line.split()[:-1]]
  assert copied and all((ROOT / word).exists() for word in copied)


def test_the_installed_extras_exist():
  extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
  for line in re.findall(r"EXTRAS=(\S+)", TEXT):
    assert set(line.split(",")) <= extras.keys()
