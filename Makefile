.PHONY: demo test test-quick bench
export PYTHON ?= python3

# Fine-tune a real small model on data/, measured before and after; no GPU, no hub.
demo:
	@./setup.sh requirements.txt
	@.venv/bin/python demo.py

# All tests; test-quick leaves out those that start other programs.
test:
	@./setup.sh requirements-dev.txt
	@.venv/bin/python -m pytest -q tests

test-quick:
	@./setup.sh requirements-dev.txt
	@.venv/bin/python -m pytest -q tests -m "not slow"

# This recipe beside its peers, interleaved, in an environment of its own.
bench:
	@VENV=.venv-bench ./setup.sh benchmarks/requirements.txt
	@.venv-bench/bin/python benchmarks/bench.py
