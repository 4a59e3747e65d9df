# Every target works on a fresh clone: those that need the environments depend on `setup`, which takes a second when
# there is nothing to do. Variables (also from the environment), all optional:
#   VENV, PYTHON              orchestrator environment (.venv) and its Python, 3.11 to 3.13
#   ENGINE                    auto | cpu | cuda | none     ENGINE_VENV, ENGINE_BASE_PYTHON  engine environment (.venv-engine)
#   MODEL_CACHE               folder of the demo models (.models)
#   INSTALLER                 auto | uv | pip              TORCH_INDEX_URL  index with torch's processor build
SHELL := /bin/bash
.DEFAULT_GOAL := help
.SUFFIXES:
.NOTPARALLEL:

VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=

# The product reads these two as well; there a relative path would hang on the working folder.
ifneq ($(MODEL_CACHE),)
override MODEL_CACHE := $(abspath $(MODEL_CACHE))
export MODEL_CACHE
endif
ifneq ($(ENGINE_VENV),)
export ENGINE_PYTHON ?= $(abspath $(ENGINE_VENV))/bin/python
endif

.PHONY: help setup setup-label-studio demo curation-demo up test pytest test-no-engine faults chaos lint types bench bench-api screenshots lock clean distclean

help:  ## list the targets
	@echo "make <target>:"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{printf "%-16s %s\n", $$1, $$2}'

setup:  ## environments, project and demo models; does only what is missing
	@python3 scripts/setup.py --venv "$(VENV)"

setup-label-studio:  ## setup, and Label Studio in an environment of its own (1 GB), for the tests of the curation
	@python3 scripts/setup.py --venv "$(VENV)" --label-studio

demo: setup  ## a real batch of 40 questions through the whole stack, then stop it
	@$(BIN)/python scripts/demo.py

curation-demo: setup-label-studio  ## a batch, its review in a real Label Studio, training sets and a regression; twice is as once
	@$(BIN)/python scripts/curation_demo.py $(DEMO_ARGS)

up: setup  ## start the API, Dagster and the engine manager; Ctrl-C stops all of it
	@$(BIN)/vllm-batch up

# One line before each tool, so that a long log says which one failed.
lint: setup  ## ruff, its formatter, and the layers
	@echo "== ruff check" && $(BIN)/ruff check .
	@echo "== ruff format" && $(BIN)/ruff format --check .
	@echo "== lint-imports" && $(BIN)/lint-imports

types: setup  ## mypy, strict
	@echo "== mypy" && $(BIN)/mypy

test: lint types pytest  ## lint, types and every test, the real engine included

pytest: setup-label-studio  ## every test, or those that PYTEST_ARGS names
	@echo "== pytest, $$($(BIN)/python -V)" && $(BIN)/python -m pytest $(PYTEST_ARGS)

test-no-engine: export ENGINE := none
# The slow ones start whole stacks for minutes, and `make test` runs them; one of them is enough for another Python.
test-no-engine: setup  ## the tests that need no vLLM, for the other Pythons
	@echo "== pytest without the engine, $$($(BIN)/python -V)" && \
	  $(BIN)/python -m pytest -m "not engine and not slow and not label_studio" --ignore=tests/e2e $(PYTEST_ARGS) && \
	  $(BIN)/python -m pytest tests/defs/test_stack.py -k batch_of_several_chunks $(PYTEST_ARGS)

faults: setup  ## every phase of a batch meets every fault; half an hour, writes the table of docs/reliability.md
	@$(BIN)/python -m tests.faults $(FAULTS_ARGS)

chaos: setup  ## random faults at random times: make chaos SEED=1 MINUTES=5
	@$(BIN)/python -m tests.faults.chaos --seed "$(or $(SEED),1)" --minutes "$(or $(MINUTES),5)"

bench: setup  ## measure against vLLM's own run_batch; writes bench/results/
	@$(BIN)/python -m bench

bench-api: setup  ## measure the API alone: validation, upload, polling; no vLLM; writes bench/results/
	@$(BIN)/python -m bench validation upload polling

screenshots: setup  ## take the pictures of docs/ with a real browser
	@$(BIN)/python scripts/screenshots.py

lock: setup  ## compile requirements/*.in again; LOCK_ARGS=--upgrade raises the versions
	@$(BIN)/python scripts/lock.py $(LOCK_ARGS)

clean:  ## delete caches; environments, models and state stay
	@rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	@find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean  ## clean, and delete the environments and the models; state stays
	@rm -rf .venv .venv-engine .venv-label-studio .venv-clients .venv-3.* .models .setup.lock
