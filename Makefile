# PYTHON: an interpreter with the packages already there; without it .venv is made (see tools/environment.sh).
PYTHON ?= $(shell DEV=1 bash tools/environment.sh)

.PHONY: setup train test test-gpu bench lint format

setup:
	@DEV=1 bash tools/environment.sh

train:
	bash examples/pretrain_mom_a100.sh

# Tests that fork training ranks want a process that has started no threads: each of their folders gets its own.
# Two workers on two cores: neither they nor what they start may take more threads.
test: export OMP_NUM_THREADS = 1
test:
	"$(PYTHON)" -m pytest tests/megatron_patches
	"$(PYTHON)" -m pytest tests/linear_moe/parallel
	"$(PYTHON)" -m pytest -n 2 --dist loadfile --ignore tests/megatron_patches --ignore tests/linear_moe/parallel

# The kernels' and layers' tests, one after the other, on a machine with a GPU.
test-gpu:
	"$(PYTHON)" -m pytest tests/mom_layers tests/linear_moe

bench:
	mkdir -p runs
	"$(PYTHON)" tools/bench_kernels.py
	"$(PYTHON)" tools/bench_layers.py
	"$(PYTHON)" tools/bench_layers.py --lengths --plot runs/bench_lengths.png
	"$(PYTHON)" tools/bench_models.py
	"$(PYTHON)" tools/bench_decode.py --plot runs/bench_decode.png

lint:
	"$(PYTHON)" -m ruff check .
	"$(PYTHON)" -m ruff format --check .

format:
	"$(PYTHON)" -m ruff check --fix .
	"$(PYTHON)" -m ruff format .
