# Everything runs from .venv, made by `make install` from the pinned requirements; no target touches the system's Python.

VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
INSTALLED_COMPILE := $(VENV)/.installed-compile
PROTOC := .cache/protoc

# Candidates in order of preference; one counts when it runs, is new enough and can make a venv. Override: make install PYTHON=...
PYTHONS := $(or $(PYTHON),python3.11 python3.12 python3.13 python3.14 python3 python)
PYTHON_OK := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))

.DEFAULT_GOAL := help
.PHONY: help install install-compile test lint demo compile-check protos clean

help:  ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## make .venv with the pinned requirements and this package

$(INSTALLED): third_party/requirements.txt pyproject.toml
	@if ! $(PY) -c '$(PYTHON_OK)' 2>/dev/null; then \
	  found=; for p in $(PYTHONS); do \
	    if $$p -c '$(PYTHON_OK)' 2>/dev/null; then found=$$p; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then echo "no Python >= 3.11 with venv and ensurepip among: $(PYTHONS)" >&2; exit 1; fi; \
	  echo "making $(VENV) with $$($$found --version)"; \
	  $$found -m venv --clear $(VENV); \
	fi
	@echo "installing $$(grep -c == third_party/requirements.txt) pinned packages into $(VENV) (a minute or two the first time)"
	@$(PY) -m pip install --disable-pip-version-check -q -r third_party/requirements.txt
	@$(PY) -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	@touch $@

install-compile: $(INSTALLED_COMPILE)  ## add the compilers for TPU and GPU targets (about 1 GB)

$(INSTALLED_COMPILE): $(INSTALLED) third_party/requirements-compile.txt
	$(PY) -m pip install --disable-pip-version-check -q --no-deps -r third_party/requirements-compile.txt
	@touch $@

test: install  ## run the tests; ARGS="tests/kvcache -k pages" narrows them
	$(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

lint: install  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m mypy

demo: install  ## a real model, prefilled by one process and decoded by another; MODEL=... picks another one
	$(PY) -m experiments.demo $(if $(MODEL),--model=$(MODEL))

# ptxas comes from the wheel where the machine has none.
compile-check: install-compile  ## compile the steps for TPU pods and GPU nodes that are not here
	PATH="$$PATH:$$(echo $(CURDIR)/$(VENV)/lib/python3*/site-packages/nvidia/cu13/bin)" $(PY) -m experiments.compile_check

# An own environment: generated code runs on the protobuf that made it or newer, so the oldest supported one makes it.
protos: install  ## regenerate prfaas_jax/serving/proto/*_pb2*
	test -x $(PROTOC)/bin/python || $(PY) -m venv $(PROTOC)
	$(PROTOC)/bin/python -m pip install --disable-pip-version-check -q grpcio-tools==1.75.1
	$(PROTOC)/bin/python -m prfaas_jax.serving.proto.generate

clean:  ## remove environments, caches and runs
	rm -rf $(VENV) .venv312 .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis runs build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
