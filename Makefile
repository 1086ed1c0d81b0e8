# Every target does its own set-up: a virtual environment from locks/dev.lock, a control plane in a cache outside the checkout.
PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help venv binaries demo test test-vllm chaos mutate check crds docs lock bench-scale soak bench image-check clean

help: ## say what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

venv: ## make .venv (uv, locks/dev.lock)
	@$(PYTHON) tools/setup.py

binaries: ## find or build kube-apiserver, etcd, Helm, an S3 server ... (in a cache, 7 minutes at the first time)
	@$(PYTHON) tools/binaries.py

demo: ## the main job on a real control plane on this machine: install, apply, watch, load (KEEP=1 leaves it up)
	@$(PYTHON) tools/demo.py $(if $(KEEP),--keep)

test: ## all tests that can run here (LANES=1: one folder at a time); says what it left out and why (ARGS="-k resume" for some)
	@$(PYTHON) tools/setup.py --with-binaries
	@$(BIN)/python tools/run_tests.py $(ARGS)
	@echo "left out: loading with vLLM (make test-vllm), building the images (make image-check)"

test-vllm: ## load the results with vLLM on the CPU, in an environment of its own
	@$(PYTHON) tools/setup.py --with-vllm
	@$(BIN)/python -m pytest -m vllm tests/e2e/test_vllm.py tests/e2e/test_vllm_windows.py tests/e2e/test_vllm_runtime.py $(ARGS)

chaos: ## storms with other chances (SEEDS=20), and an operator killed at both sides of each of its calls
	@$(PYTHON) tools/setup.py --with-binaries
	SEEDS=$(or $(SEEDS),20) CHAOS_EVERY_SIDE=1 $(BIN)/python -m pytest -s tests/chaos $(ARGS)

mutate: ## take each guard of the operator away in a copy of the tree; its test must fail (3 minutes; ARGS="finalizer" for some)
	@$(PYTHON) tools/setup.py --with-binaries
	@$(BIN)/python tests/chaos/mutate.py $(ARGS)

check: venv ## ruff, mypy --strict, import-linter, generated files up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/generate_crds.py --check
	$(BIN)/python tools/generate_docs.py --check

crds: venv ## generate the CRD, the chart's copy and its admission policy from the models
	$(BIN)/python tools/generate_crds.py

docs: venv ## generate docs/failures.md from the table of failures
	$(BIN)/python tools/generate_docs.py

lock: venv ## compile the lock files from pyproject.toml
	$(PYTHON) tools/lock.py

bench: venv ## throughput, memory and quality beside cp, boto3, llm-compressor, TRL and llama.cpp; kernels; latency from apply to Job (an hour and a half)
	$(BIN)/python benchmarks/data_free.py
	$(BIN)/python benchmarks/calibrated.py
	$(BIN)/python benchmarks/pruning.py
	$(BIN)/python benchmarks/experts.py
	$(BIN)/python benchmarks/expert_memory.py
	$(BIN)/python benchmarks/distil.py
	$(BIN)/python benchmarks/gguf_beside.py
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/apply_latency.py

bench-scale: ## thousands of jobs with KWOK in place of nodes, beside a bare client (an hour; ARGS="--jobs 1000" for a few minutes)
	@$(PYTHON) tools/setup.py --with-binaries
	@$(BIN)/python benchmarks/scale.py $(ARGS)

soak: ## does the operator's memory grow at a steady rate of jobs? (20 minutes; ARGS="--minutes 5 --rate 2")
	@$(PYTHON) tools/setup.py --with-binaries
	@$(BIN)/python benchmarks/soak.py $(ARGS)

image-check: venv ## build both images with buildah, without a container engine, and start them
	$(BIN)/python tools/image_check.py $(ARGS)

clean: ## remove the virtual environment and what tools left in the checkout (the cache stays)
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
