"""Writes one HTML page with the results and plots of a run.

Reads: evaluation.json in the workdir, the runs in evaluate.models, and the first store in
train.records.

Writes: report.html in the workdir. The page is a single file, without scripts or external images.

Config: evaluate.models, train.records, export.dir.

Example:
  distill-jax report --config=configs/demo.py --workdir=runs/demo
"""

from __future__ import annotations

from pathlib import Path

from distill_jax.config import Config
from distill_jax.models import runs
from distill_jax.records import describe
from distill_jax.records.store import open_store
from distill_jax.report import html_report
from distill_jax.types import JsonObject


def run(config: Config, workdir: Path) -> JsonObject:
  """Writes report.html into `workdir`; returns the summary of `html_report.write_report`."""
  folders = {
    name: runs.run_folder(source)
    for name, source in config.evaluate.models.items()
    if source.startswith(runs.RUN)
  }
  records = None
  if config.train.records:
    records = describe.describe(open_store(config.train.records[0]))
  return html_report.write_report(
    workdir, runs=folders, records=records, export_dir=config.export.dir
  )
