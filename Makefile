# Everything runs through this file, locally and in CI. `make help` lists the targets.
# Needs Python >= 3.10 with venv, and a Rust toolchain >= 1.85; all else is installed into $(VENV).

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Set GPU_EXTRA=0 to leave torch and triton (4.7 GB) out of `make test`: the tests of the copy kernels then skip.
GPU_EXTRA ?= 1
export CARGO_TERM_COLOR ?= auto
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-rust test-python check check-rust check-python bench safety develop wheel format lock clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

demo: $(BIN)/python ## Build, replay the five built-in workloads under every policy, write report.html
	@echo "building agentrt in release (one to three minutes the first time)"
	$(BIN)/python -m pip install --quiet --constraint requirements.lock '.[report]'
	$(BIN)/agentrt replay --html report.html --json report.json

test: test-rust test-python ## Run all tests: cargo test and pytest (installs what they need)

test-rust:
	cargo test --workspace --locked

test-python: install-dev install-gpu
	$(BIN)/python -m pytest

check: check-rust check-python ## Run all static checks: rustfmt, clippy, rustdoc, ruff, mypy, stubtest

check-rust:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked --quiet

check-python: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd $(VENV) && bin/python -m mypy.stubtest agentrt._core --concise --allowlist ../tests/stubtest-allowlist.txt

bench: install-dev ## Run the benchmarks: criterion and pytest-benchmark
	cargo bench --workspace --locked
	$(BIN)/python -m pytest benches --benchmark-enable --benchmark-only

# The engine benchmarks have an environment of their own: vLLM is large and pins much.
E2E_VENV ?= .venv-e2e
E2E_JSON ?= e2e.json
.PHONY: e2e e2e-smoke e2e-server e2e-policies e2e-env
e2e: e2e-env ## Run a real vLLM on the CPU under several policies, 5 workloads (E2E_JSON=FILE; goes on where it stopped)
	$(E2E_VENV)/bin/python benches/e2e/run.py --json $(E2E_JSON)

e2e-smoke: e2e-env ## Run the vLLM adapter's tests, and the engine benchmark on one small workload
	$(E2E_VENV)/bin/python -m pytest tests/engines/vllm -m "not slow"
	@rm -f e2e-smoke.json e2e-smoke.stock.json
	$(E2E_VENV)/bin/python benches/e2e/run.py --smoke --json e2e-smoke.json

e2e-server: e2e-env ## Run `agentrt serve` and `agentrt record` in front of real vLLM servers on the CPU
	$(E2E_VENV)/bin/python -m pytest tests/engines/vllm -m slow

e2e-policies: e2e-env ## Run each scheduling policy on and off in a real vLLM on the CPU
	$(E2E_VENV)/bin/python benches/e2e/policies.py

e2e-env: wheel
	@scripts/e2e_env.sh $(E2E_VENV) "$$(ls dist/*.whl)"

safety: ## Run the slow proofs: loom models, ThreadSanitizer, long property and fuzz runs
	scripts/safety.sh

develop: $(BIN)/uv ## Install into $(VENV) from the working tree: edits of Python files are live
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements.lock 'maturin>=1.12,<2'
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/maturin develop --release --extras dev,report

wheel: $(BIN)/uv ## Build the abi3 wheel into dist/
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements.lock 'maturin>=1.12,<2'
	@rm -f dist/*.whl
	$(BIN)/maturin build --release --locked --quiet --interpreter $(BIN)/python --out dist

format: $(BIN)/uv ## Format Rust and Python
	cargo fmt --all
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements.lock ruff
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

lock: $(BIN)/uv ## Renew requirements.lock (Cargo.lock: cargo update)
	$(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.10 --extra report --extra dev --extra gpu \
	  --no-annotate --no-header --no-emit-index-url --no-emit-find-links --output-file requirements.lock

clean: ## Remove the virtual environment and everything built
	cargo clean
	rm -rf $(VENV) dist report.html report.json

.PHONY: install-dev install-gpu
# Tests and checks run against the wheel that users get, not against the working tree.
install-dev: wheel
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements.lock "$$(ls dist/*.whl)[dev,report]"
	$(BIN)/uv pip install --quiet --python $(BIN)/python --reinstall-package agentrt --no-deps dist/*.whl

install-gpu: install-dev
	@if [ "$(GPU_EXTRA)" != 1 ]; then echo "tests/transfer will skip: GPU_EXTRA=$(GPU_EXTRA)"; \
	elif $(BIN)/python -c 'import torch, triton' 2>/dev/null; then :; \
	else echo "installing torch and triton for tests/transfer (4.7 GB; GPU_EXTRA=0 leaves them out)"; \
	  timeout 600 $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements.lock "$$(ls dist/*.whl)[gpu]" \
	  || echo "tests/transfer will skip: torch and triton cannot be installed here"; fi

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $(PYTHON) is older than 3.10; set PYTHON=python3.12, for example"; exit 1; }
	@command -v cargo >/dev/null || { echo "error: no Rust toolchain; install one from https://rustup.rs"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "error: $(PYTHON) has no venv; on Debian and Ubuntu: apt install python3-venv"; rm -rf $(VENV); exit 1; }

$(BIN)/uv: $(BIN)/python
	$(BIN)/python -m pip install --quiet 'uv>=0.5,<1'
