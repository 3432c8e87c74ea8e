# Every target makes its own .venv first and needs nothing but Python, make and the package registry.
PYTHON ?= python3
PRESET ?= toy64
ARGS ?=
PIP := .venv/bin/python -m pip --disable-pip-version-check --quiet

# Without byte code every Ray worker would parse torch anew; a foreign PYTHONPATH would shadow the packages.
unexport PYTHONDONTWRITEBYTECODE PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help demo studies stack test road soak lint nightly clean

help: ## say what can be made
	@grep -E '^[a-z]+:.*## ' Makefile | sed 's/:.*## /|/' | awk -F'|' '{printf "  make %-9s %s\n", $$1, $$2}'

demo: .venv/.for-use ## from toy faces to a champion and pictures: make demo [PRESET=toy32] [ARGS=--again]
	@.venv/bin/python -m jobs demo $(PRESET) $(ARGS)

studies: .venv/.for-use ## what a choice is worth, tables and plots in studies/: make studies [ARGS=mixing]
	@.venv/bin/python -m jobs studies $(ARGS) >/dev/null & .venv/bin/python -m jobs studies $(ARGS) && wait

stack: .venv/.for-stack ## S3, PostgreSQL, MLflow and Ray on this machine: make stack [ARGS=--fault-proxy]
	@.venv/bin/python -m jobs stack up $(ARGS)

test: .venv/.for-work ## laws and promises, at most 15 minutes: make test [ARGS="-k order"]
	.venv/bin/python -m pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder $(ARGS)

road: .venv/.for-work ## the README, command by command, from a fresh clone on
	.venv/bin/python -m pytest -m road --timeout=1200 $(ARGS)

soak: .venv/.for-work ## three minutes of faults at random, and the run nobody disturbed
	.venv/bin/python -m pytest -m soak --timeout=1800 $(ARGS)

nightly: .venv/.for-work ## the long tests
	.venv/bin/python -m pytest -m nightly --timeout=7200 $(ARGS)

lint: .venv/.for-work ## ruff, pyright, import-linter
	.venv/bin/ruff check .
	.venv/bin/pyright --pythonpath .venv/bin/python
	.venv/bin/lint-imports

clean: ## remove what make made, demo and .venv included
	rm -rf .venv demo demo-* build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find glow pipeline jobs tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	@$(PYTHON) -m venv .venv

.venv/.for-use: pyproject.toml constraints.txt | .venv/bin/python
	@echo "installing into .venv (once, minutes)"
	@$(PIP) install --constraint constraints.txt --editable .
	@touch $@

.venv/.for-stack: pyproject.toml constraints.txt | .venv/bin/python
	@echo "installing into .venv with MLflow's server (once, minutes)"
	@$(PIP) install --constraint constraints.txt --editable '.[stack]'
	@touch $@ .venv/.for-use

.venv/.for-work: pyproject.toml constraints.txt | .venv/bin/python
	@echo "installing into .venv with the tools of development (once, minutes)"
	@$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@touch $@ .venv/.for-use
