# Everything a newcomer or the continuous integration needs; `make` alone lists it.
#
# Environments are made on first use with any Python >= 3.11 and kept: .venv, and .venv-parity for `make parity`.
# `make TARGET PYTHON=/path/to/python3.13` uses that interpreter, in environments of its own (.venv-python3.13).

VENV := .venv$(if $(PYTHON),-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
PARITY := $(VENV)-parity

# The pyright package carries the checker and its node; without this it asks the network for a newer version each time.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

# Two targets installing into one environment at a time would break it.
.NOTPARALLEL:
.PHONY: help demo test quick lint parity tpu-aot clean

help:
	@echo "make demo     from nothing to a right answer about a short video, by the small trained model in examples/tiny_keye"
	@echo "make test     formatting, lint, types and all tests but the comparisons with other people's code"
	@echo "make parity   the comparisons: adds CPU torch and transformers in an environment of their own"
	@echo "make tpu-aot  compile kernels and exported graphs for TPU chips that need not be here (adds libtpu in its own environment)"
	@echo "make quick    the tests that take seconds"
	@echo "make lint     formatting, lint and types alone"
	@echo "make clean    remove the environments, caches and what the demo wrote"
	@echo "With PYTHON=/path/to/python3.13 a target uses that interpreter (3.11 or newer) and its own environment."

demo:
	@.ci/venv.sh $(VENV) video $(PYTHON)
	@$(BIN)/python -m examples.demo --clip 2

test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not parity"

quick:
	@.ci/venv.sh $(VENV) test $(PYTHON)
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow and not parity"

lint:
	@.ci/venv.sh $(VENV) test $(PYTHON)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright --pythonpath $(BIN)/python

tpu-aot:
	@.ci/venv.sh $(VENV)-tpu tpu $(PYTHON)
	$(VENV)-tpu/bin/python -m benchmarks.tpu_kernels
	$(VENV)-tpu/bin/python -m benchmarks.tpu_aot --quick

parity:
	@.ci/venv.sh $(PARITY) parity $(PYTHON)
	$(PARITY)/bin/python -m pytest -m parity tests/parity

clean:
	rm -rf .venv .venv-* .pytest_cache .ruff_cache .hypothesis build *.egg-info demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
