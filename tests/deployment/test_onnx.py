"""The conversion to ONNX in docs/deploy.md, run on an exported BERT and compared with it."""

import importlib.util
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from distill_jax.hub.export import export_model
from distill_jax.models import bert

PAGE = Path(__file__).parents[2] / "docs" / "deploy.md"
MISSING = [n for n in ("onnx", "onnxscript", "onnxruntime") if not importlib.util.find_spec(n)]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"pip install {' '.join(MISSING)}")
def test_bert(tmp_path, monkeypatch):
  import onnxruntime
  import torch

  model = jax.jit(lambda key: bert.Model(bert.TINY, key))(jax.random.key(0))
  folder = tmp_path / "student"
  export_model(model, folder, tokenizer=None, generation={}, card="", dtype="float32")
  section = PAGE.read_text(encoding="utf-8").partition("\n## ONNX\n")[2]
  code = re.search(r"^```python\n(.*?)^```$", section, re.M | re.S)[1]
  code = code.replace("runs/sentiment/student", str(folder))
  monkeypatch.chdir(tmp_path)
  page = {}
  exec(compile(code, str(PAGE), "exec"), page)
  session = onnxruntime.InferenceSession(tmp_path / "bert.onnx")
  rng = np.random.default_rng(0)
  for batch, length in ((3, 20), (1, 5)):  # other sizes than those on the page
    tokens = rng.integers(0, 256, (batch, length))
    mask = np.arange(length) < rng.integers(1, length, (batch, 1))
    inputs = {"input_ids": tokens, "attention_mask": mask.astype(np.int64)}
    with torch.no_grad():
      want = page["model"](**{k: torch.from_numpy(v) for k, v in inputs.items()}).logits
    (found,) = session.run(["logits"], inputs)
    np.testing.assert_allclose(found, want.numpy(), atol=1e-6)  # float32, logits below 1
