"""The end of `distill-jax distill` in words."""

from distill_jax.recipe import result

MODELS = {
  "teacher": {"ce": 2.0, "kl": 0.0, "agreement": 1.0, "parameters": 100},
  "start": {"ce": 4.0, "kl": 2.0, "agreement": 0.25, "parameters": 50},
  "distilled": {"ce": 3.0, "kl": 1.0, "agreement": 0.5, "parameters": 50},
}
SAMPLES = [
  {"prompt": "A heading", "teacher": "\n\n\n", "student": " words"},
  {"prompt": "Once upon", "teacher": " a time", "student": " a hill"},
]


def ended(samples, export_format="hf"):
  files = {"export_dir": "runs/x/export", "report": "report.html", "config": "config.py"}
  return result.text(
    {"models": MODELS, "tokens": 1000, "samples": samples, "export_format": export_format} | files
  )


def test_the_result_shows_models_a_sample_and_the_lines_that_load_the_student():
  text = ended(SAMPLES)
  assert text.index("teacher") < text.index("student before") < text.index("student after")
  assert "pipeline('text-generation', model='runs/x/export')" in text
  assert "pip install transformers torch" in text


def test_a_gguf_file_is_not_for_transformers():
  text = ended(SAMPLES, "gguf")
  assert "The student is in runs/x/export." in text
  assert "transformers" not in text


def test_a_sample_with_text_is_preferred_to_a_blank_one():
  assert "Once upon" in ended(SAMPLES) and "A heading" not in ended(SAMPLES)
  assert "A heading" in ended(SAMPLES[:1])
