.PHONY: demo test test-quick lint format bench bench-gpu
export PYTHON ?= python3

# Fine-tune a real small model on data/, measured before and after; no GPU, no hub.
demo:
	@./setup.sh requirements.txt
	@.venv/bin/python -m demo.demo

# All tests, by one worker for each of two cores; test-quick leaves out those that start other programs.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n $(WORKERS) --dist worksteal
test:
	@./setup.sh dev
	@$(PYTEST)

test-quick:
	@./setup.sh dev
	@$(PYTEST) -m "not slow"

# Format, lint, types, the order of the rooms.
lint:
	@./setup.sh dev
	@.venv/bin/ruff format --check -q .
	@.venv/bin/ruff check -q .
	@.venv/bin/python -m mypy
	@.venv/bin/lint-imports

format:
	@./setup.sh dev
	@.venv/bin/ruff format -q .
	@.venv/bin/ruff check -q --fix .

# This recipe beside its peers, interleaved, in environments of their own; what does not install is left out.
bench:
	@VENV=.venv-bench ./setup.sh bench
	@VENV=.venv-llamafactory ./setup.sh benchmarks/llamafactory.txt || true
	@.venv-bench/bin/python benchmarks/bench.py

# What only a GPU shows, the most important first; a run that is on record for this GPU is left out.
bench-gpu:
	@VENV=.venv-bench ./setup.sh bench,fla
	@! command -v nvidia-smi >/dev/null || VENV=.venv-unsloth ./setup.sh benchmarks/unsloth.txt || true
	@.venv-bench/bin/python benchmarks/gpu.py
