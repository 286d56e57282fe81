"""`report` on a run whose student is not exported yet."""

import json

from distill_jax import config as configs
from distill_jax.commands import report


def test_the_page_names_the_export_only_if_it_exists(tmp_path):
  row = {"ce": 2.0, "kl": 0.0, "agreement": 1.0, "parameters": 100}
  evaluation = {"models": {"teacher": row, "distilled": row}, "tokens": 10}
  (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
  c = configs.base()
  c.losses.soft = configs.loss("kd")
  c.export.dir = str(tmp_path / "export")
  config = configs.resolve(c)
  assert report.run(config, tmp_path)["export_dir"] == ""
  assert "The exported student is in" not in (tmp_path / "report.html").read_text()
  (tmp_path / "export").mkdir()
  assert report.run(config, tmp_path)["export_dir"] == config.export.dir
  assert "The exported student is in" in (tmp_path / "report.html").read_text()
