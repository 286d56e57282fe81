"""Writes one HTML page with the results and plots of a run, also while it is going.

Reads: the runs in evaluate.models, and in the workdir itself; evaluation.json, examples.json and
deployment.json in the workdir; and the first store in train.records. What does not exist yet is
omitted or shown with its progress. The command changes nothing but the page, and takes no lock, so
that it can be called while another command uses the workdir.

Writes: report.html in the workdir. The page is a single file, without scripts or external images.

Config: evaluate.models, train.records, export.dir.

Example:
  distill-jax report --config=configs/demo.py --workdir=runs/demo
"""

from __future__ import annotations

from pathlib import Path

from distill_jax.config import Config
from distill_jax.errors import InputError
from distill_jax.models import runs
from distill_jax.records import describe
from distill_jax.records.store import open_store
from distill_jax.report import html_report
from distill_jax.runtime import storage
from distill_jax.training.metric_writer import FILE
from distill_jax.types import JsonObject


def run(config: Config, workdir: Path) -> JsonObject:
  """Writes report.html into `workdir`; returns the summary of `html_report.write_report`."""
  from distill_jax.hub.export_folder import exists  # imports orbax

  folders = {
    name: runs.run_folder(source)
    for name, source in config.evaluate.models.items()
    if source.startswith(runs.RUN)
  }
  if not folders and storage.fetched(workdir / FILE).is_file():
    folders = {workdir.absolute().name: workdir}
  records = None
  if config.train.records:
    try:
      records = describe.describe(open_store(config.train.records[0]))
    except InputError as error:  # not recorded yet, for example
      records = {"problem": str(error)}
  exported = config.export.dir if exists(config.export.dir) else ""
  return html_report.write_report(
    workdir, runs=folders or None, records=records, export_dir=exported
  )
