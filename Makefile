# Two commands: `make run` trains the demo from corpus to report, `make test` checks the code. `make docs` builds the site.
PYTHON ?= python3
VENV ?= .venv
CONFIG ?= demo
CORPUS ?=
SET ?=

.PHONY: run test campaign golden lint format docs clean

run: $(VENV)/.installed
	$(VENV)/bin/asc-ray pipeline --config "$(CONFIG)" $(if $(CORPUS),--set "corpus.path=$(abspath $(CORPUS))") $(SET)

test: $(VENV)/.installed-dev lint
	$(VENV)/bin/pytest --numprocesses 2 --dist worksteal

campaign: $(VENV)/.installed-dev
	$(VENV)/bin/pytest -m campaign

golden: $(VENV)/.installed-dev
	$(VENV)/bin/python tests/renew.py

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: $(VENV)/.installed-docs
	$(VENV)/bin/python docs/configuration.py
	$(VENV)/bin/mkdocs build --strict

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "asc-ray needs Python 3.11 or newer; give one with make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/pip install --editable '.[train]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/pip install --editable '.[dev]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/pip install --editable '.[docs]'
	@touch $@ $(VENV)/.installed
