# make quickstart   installs the package into .venv and runs the whole pipeline on the embedded default
# make test         installs what the tests need and runs them
# make check        ruff, mypy and the tests: what CI runs
# make docs         the documentation as HTML, in build/docs; any warning is an error
# make base         remakes the tiny bases that ship with the package (personas_tune/bases), about an hour
# make clean        removes .venv, caches and build leftovers; results in runs/ stay

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install

.PHONY: help quickstart test check lint types docs base clean
.NOTPARALLEL:
.DEFAULT_GOAL := help

help:
	@sed -n '/^$$/q; s/^# //p' Makefile

quickstart: $(VENV)/.package
	$(BIN)/tune run persona_pipeline --config quickstart.yaml
	@echo
	@echo "tune is in the environment that was made: begin with  . $(BIN)/activate"
	@echo "For your own log: personas-tune cp quickstart.yaml mine.yaml, and docs/own_data.md"

# Two at a time, a file's tests together: they share what is costly to make.
test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: lint types test

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.dev
	$(BIN)/mypy

# -n: a function, page or heading that is named must exist.
docs: $(VENV)/.dev
	$(BIN)/python -m sphinx -q -W --keep-going -n -d build/doctrees docs build/docs

BASE_FILES := model.safetensors config.json tokenizer.model special_tokens.json

# The commands at the heads of configs/quickstart_base.yaml and configs/quickstart_llama3_base.yaml.
base: $(VENV)/.package
	$(BIN)/tune run persona_prepare --config quickstart.yaml
	$(BIN)/tune run persona_pipeline --config quickstart_base.yaml 'stages=[persona_prepare,persona_distill,persona_cluster,persona_raft]'
	$(BIN)/tune run persona_base --config quickstart_base.yaml
	$(BIN)/tune run persona_base --config quickstart_llama3_base.yaml
	mkdir -p personas_tune/bases/tiny_phi3 personas_tune/bases/tiny_llama3
	cd runs/quickstart_base/base && cp $(BASE_FILES) $(CURDIR)/personas_tune/bases/tiny_phi3/
	cd runs/quickstart_llama3_base/base && cp $(BASE_FILES) $(CURDIR)/personas_tune/bases/tiny_llama3/

clean:
	rm -rf $(VENV) build dist recipes/personas_tune.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp file says what was installed, so that it happens once and again when pyproject.toml changes.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info[:2] == (3, 11) else "Python 3.11 is needed, this is " + sys.version.split()[0] + "; name one with: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.package: pyproject.toml $(VENV)/.created
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.created
	$(PIP_INSTALL) -e '.[test]'
	@touch $(VENV)/.package $@

$(VENV)/.dev: pyproject.toml $(VENV)/.created
	$(PIP_INSTALL) -e '.[dev]'
	@touch $(VENV)/.package $(VENV)/.test $@
