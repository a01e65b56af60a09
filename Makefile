# The two commands to know: `make demo` and `make test`. Everything runs from .venv in this directory.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help install demo test check docs docs-check docs-site dist clean

help:
	@echo "make demo       train small models on the spot and see three skills move into one of them"
	@echo "make test       the whole test suite"
	@echo "make install    the environment alone: .venv/bin/graftllm"
	@echo "make check      formatting, lint, types, import layers"
	@echo "make docs       write the --help texts into docs/cli.md"
	@echo "make docs-check fail if docs/cli.md is not current"
	@echo "make docs-site  the documentation site, into site/"
	@echo "make dist       source archive and wheel, checked, into dist/"

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "GraftLLM needs Python 3.11 or newer; $(PYTHON) is older. Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --no-compile --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/graftllm demo --dir runs/demo

test: install
	$(BIN)/pytest --numprocesses logical --dist loadgroup

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

docs: install
	$(BIN)/python docs/write_cli.py

docs-check: install
	$(BIN)/python docs/write_cli.py --check

docs-site: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --clean

dist: install
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf .venv build dist site .pytest_cache .ruff_cache .hypothesis .import_linter_cache
