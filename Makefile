# PYTHON: an interpreter with the packages already there; without it .venv is made (see tools/environment.sh).
PYTHON ?= $(shell DEV=1 bash tools/environment.sh)

.PHONY: setup train test test-gpu bench lint format

setup:
	@DEV=1 bash tools/environment.sh

train:
	bash examples/pretrain_mom_a100.sh

test:
	$(PYTHON) -m pytest -n 2 --dist loadfile

# The kernels' and layers' tests, one after the other, on a machine with a GPU.
test-gpu:
	$(PYTHON) -m pytest tests/mom_layers tests/linear_moe

bench:
	$(PYTHON) tools/bench_layers.py

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
