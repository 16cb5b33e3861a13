PYTHON ?= python3
VENV ?= .venv
PEERS_VENV ?= .venv-peers
# Whole files to a process: each would make the models that a file compiles.
PYTEST_ARGS ?= -n 2 --dist loadfile
BENCH_ARGS ?=

BIN := $(VENV)/bin
MADE := $(VENV)/.made
PEERS_MADE := $(PEERS_VENV)/.made
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
NEEDS_PYTHON := import sys; sys.version_info >= (3, 11) or sys.exit("specqd needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": name one with make PYTHON=python3.11")

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint format bench peers editable-strict clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(MADE) ## make .venv with everything that the other targets need

# torch goes first, so that nothing that depends on it can pull in another release.
$(MADE): pyproject.toml constraints.txt
	@$(PYTHON) -c '$(NEEDS_PYTHON)'
	@echo "installing into $(VENV); the first time takes some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) torch
	$(BIN)/python $(PIP_INSTALL) --editable '.[dev]'
	@touch $@

demo: $(MADE) ## fetch, compile and run SmolLM2-135M plainly and speculatively
	$(BIN)/specqd demo

test: $(MADE) ## run the tests (PYTEST_ARGS="-k mxfp4" picks some)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Static tools cannot follow the folder-to-package mapping, so types are checked in the wheel as it installs.
# build/lib would carry deleted modules into that wheel; the rest of build/ belongs to editable-strict.
lint: $(MADE) ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/lib build/bdist.* .lint
	$(BIN)/python $(PIP_INSTALL) --no-deps --no-build-isolation --target .lint .
	cd .lint && $(abspath $(BIN))/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache \
		--python-executable $(abspath $(BIN))/python --package specqd

format: $(MADE) ## apply ruff's formatting and safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(MADE) ## measure decoding against the peers that are installed (BENCH_ARGS=...)
	$(BIN)/python benchmarks/decode.py $(BENCH_ARGS)

peers: $(PEERS_MADE) ## build llama.cpp for this CPU into .venv-peers, for make bench

# llama.cpp's own AMX code ended with SIGILL on its Q4_0 and MXFP4 files where this was tried.
NO_AMX = $(if $(shell grep -sw amx_tile /proc/cpuinfo),-DCMAKE_C_FLAGS='-mno-amx-int8 -mno-amx-tile' -DCMAKE_CXX_FLAGS='-mno-amx-int8 -mno-amx-tile')

$(PEERS_MADE): constraints.txt
	@$(PYTHON) -c '$(NEEDS_PYTHON)'
	@echo "building llama.cpp into $(PEERS_VENV); this takes some minutes"
	$(PYTHON) -m venv $(PEERS_VENV)
	CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF $(NO_AMX)" $(PEERS_VENV)/bin/python $(PIP_INSTALL) \
		--no-binary llama-cpp-python llama-cpp-python gguf
	@touch $@

editable-strict: $(MADE) ## reinstall so that editors can follow specqd.passes and the rest
	$(BIN)/python $(PIP_INSTALL) --no-deps --editable . --config-settings editable_mode=strict

clean: ## remove what make made, the environments included
	rm -rf $(VENV) $(PEERS_VENV) .lint build dist specqd.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find benchmarks codegen examples frontends passes specqd tests -name __pycache__ -type d -prune -exec rm -rf {} +
