.PHONY: demo test test-quick bench
export PYTHON ?= python3

# Fine-tune a real small model on data/, measured before and after; no GPU, no hub.
demo:
	@./setup.sh requirements.txt
	@.venv/bin/python -m demo.demo

# All tests; test-quick leaves out those that start other programs.
test:
	@./setup.sh requirements-dev.txt
	@.venv/bin/python -m pytest -q tests

test-quick:
	@./setup.sh requirements-dev.txt
	@.venv/bin/python -m pytest -q tests -m "not slow"

# This recipe beside its peers, interleaved, in environments of their own; what does not install is left out.
bench:
	@VENV=.venv-bench ./setup.sh benchmarks/requirements.txt
	@VENV=.venv-llamafactory ./setup.sh benchmarks/llamafactory.txt || true
	@! command -v nvidia-smi >/dev/null || VENV=.venv-unsloth ./setup.sh benchmarks/unsloth.txt || true
	@.venv-bench/bin/python benchmarks/bench.py
