"""`report`: one HTML page with the numbers and the plots of a run."""

from __future__ import annotations

from pathlib import Path

from distill_jax.config import Config
from distill_jax.models import runs
from distill_jax.records import describe
from distill_jax.records.store import open_store
from distill_jax.report import html_report
from distill_jax.runtime import storage
from distill_jax.types import JsonObject


def run(config: Config, workdir: Path) -> JsonObject:
  """Writes report.html into `workdir` from the evaluation there and the runs it names."""
  folders = {
    name: runs.run_folder(source)
    for name, source in config.evaluate.models.items()
    if source.startswith(runs.RUN)
  }
  records = None
  if config.train.records:
    records = describe.describe(open_store(storage.local(config.train.records[0])))
  return html_report.write_report(
    workdir, runs=folders, records=records, export_dir=config.export.dir
  )
