# Everything a person or CI runs. One virtual environment, made once: `make setup` does nothing when nothing changed.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
LISTS  := cluster/image/requirements-cpu.txt cluster/image/requirements-dev.txt
STAMP  := $(VENV)/.stamp

# One thread of compilation per process and no telemetry, whatever the caller's shell says.
export VLLM_NO_USAGE_STATS := 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help setup demo test test-long bench lint types clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with everything pinned (about 3 minutes and 4 GB, once)

$(STAMP): $(LISTS) pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(addprefix -r ,$(LISTS))
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	$(BIN)/python -m compileall -q pipeline cluster jobs
	touch $@

demo: setup ## 200 chat prompts through a real vLLM engine, Parquet to Parquet
	$(BIN)/tramontane demo

lint: setup ## style and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: setup ## mypy, strict
	$(BIN)/mypy

test: lint types ## everything that CI runs
	@# As listed: the slow files first. What fails beside a neighbour on a busy machine gets one more try, without one;
	@# only where tests failed (exit code 1) and the rest was run. What needed it is in the first summary.
	$(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=30 || { \
	    test $$? -eq 1 && echo "once more, alone:" && $(BIN)/pytest -q --last-failed --last-failed-no-failures none; }

test-long: setup ## soak and fault campaigns, many minutes
	$(BIN)/pytest -q -m long

bench: setup ## ours beside the bare engine, ray.data.llm and vllm run-batch; hours: see tests/bench/compare.py
	$(BIN)/python -m tests.bench.compare --models tiny 139m --workloads natural tail prefixes short long

clean: ## remove what demo and tests wrote, not .venv
	rm -rf out .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
