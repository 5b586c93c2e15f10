# weft: every target sets itself up from nothing; the environment lives in .venv.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo test test-slow lint protos bench-demo bench-exchange bench-kill bench-startup bench-engine bench-eval bench-catalogue bench-skills catalogue bench-candidates bench-evolve bench-fingerprint bench-simmerge bench-bandit predictor conformance exactness clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt deploy/setup.sh
	@PYTHON=$(PYTHON) bash deploy/setup.sh
	@touch $(READY)

demo: setup
	$(BIN)/weft demo

test: setup
	$(BIN)/python -m pytest -n 2 -m "not slow and not foreign" tests

test-slow: setup
	$(BIN)/python -m pytest -m "slow or foreign" tests

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python protos/generate.py --check

protos: setup
	$(BIN)/python protos/generate.py

bench-demo: setup
	@$(BIN)/python tests/bench/demo.py

bench-exchange: setup
	@$(BIN)/python tests/bench/exchange.py

bench-kill: setup
	@$(BIN)/python tests/bench/kill.py

bench-startup: setup
	@$(BIN)/python tests/bench/startup.py

bench-engine: setup
	@$(BIN)/python tests/bench/engine.py

bench-eval: setup
	@$(BIN)/python tests/bench/evaluation.py

bench-catalogue: setup
	@$(BIN)/python tests/bench/catalogue.py

bench-skills: setup
	@$(BIN)/python tests/bench/skills.py

catalogue: setup
	@$(BIN)/python tests/bench/catalogue.py --build --seeds 0

bench-evolve: setup
	@$(BIN)/python tests/bench/evolve.py

bench-candidates: setup
	@$(BIN)/python tests/bench/candidates.py

# One thread: what is told of speed is that of one core.
bench-fingerprint: setup
	@OMP_NUM_THREADS=1 $(BIN)/python tests/bench/fingerprint.py

bench-simmerge: setup
	@$(BIN)/python tests/bench/simmerge.py

bench-bandit: setup
	@$(BIN)/python tests/bench/bandit.py

predictor: setup
	@$(BIN)/python tests/bench/simmerge.py --write merge_core/simmerge/choosing/predictor.safetensors

conformance: setup
	@$(BIN)/python -m pytest -q -m "" tests/conformance

exactness: setup
	@$(BIN)/python tests/merge/test_exactness.py

clean:
	rm -rf .venv .cache dist build
