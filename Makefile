# PYTHON: an interpreter that has the packages; without PYTHON the commands make .venv (see tools/environment.sh).
PYTHON ?= $(shell DEV=1 bash tools/environment.sh)

.PHONY: setup train test test-all test-gpu test-oldest test-newest compile-matrix bench results docs lint format

setup:
	@DEV=1 bash tools/environment.sh

train:
	bash examples/pretrain_mom_a100.sh

# Two workers on two cores: the workers and the processes that they start take one thread each. Tests of the parallel
# layouts share training runs and go to any free worker; elsewhere the tests of a file share fixtures and stay together.
test: export OMP_NUM_THREADS = 1
test:
	"$(PYTHON)" -m pytest -n 2 --dist worksteal tests/linear_moe/parallel
	"$(PYTHON)" -m pytest -n 2 --dist loadfile --ignore tests/linear_moe/parallel

# Every test at full length: each layout's checkpoint in each other layout, every way to kill a run, every bad input,
# every type and head size compiled for every chip, every recipe trained at its tiny size.
test-all: export MOM_ALL_LAYOUTS = 1
test-all: export MOM_ALL_KILLS = 1
test-all: export MOM_ALL_BAD_INPUTS = 1
test-all: export MOM_ALL_CHIPS = 1
test-all: export MOM_ALL_RECIPES = 1
test-all: test

# The kernels' and layers' tests, one after the other, on a machine with a GPU.
test-gpu:
	"$(PYTHON)" -m pytest tests/mom_layers tests/linear_moe

# A few minutes of tests on the oldest packages of the ranges, and on the newest, each in an environment of its own.
SELECTION = tests/mom_layers/test_mixture_of_memories.py tests/mom_layers/test_rules.py \
    tests/mom_layers/test_routing_plan_triton.py tests/mom_layers/hf/test_hf_model.py \
    tests/mom_layers/hf/test_hf_generation.py tests/mom_layers/hf/test_hf_remote_code.py \
    tests/mom_layers/hf/test_hf_classification.py tests/linear_moe/test_pretrain.py tests/tools/test_corpus_tokenizer.py \
    tests/megatron_patches/test_trusted_checkpoints.py tests/tools/test_convert_checkpoints.py

test-oldest: export OMP_NUM_THREADS = 1
test-oldest:
	"$$(DEV=tools VENV=.venv-oldest CONSTRAINTS=tools/constraints-oldest.txt bash tools/environment.sh)" -m pytest -n 2 $(SELECTION)

test-newest: export OMP_NUM_THREADS = 1
test-newest:
	"$$(DEV=tools VENV=.venv-newest CONSTRAINTS= bash tools/environment.sh)" -m pytest -n 2 $(SELECTION)

# The kernels compiled for every chip by another Triton, from `pip install --target FOLDER --no-deps triton==3.9.*`.
compile-matrix: export PYTHONPATH = $(TRITON)
compile-matrix: export TRITON_CACHE_DIR = $(TRITON)/cache
compile-matrix:
	"$(PYTHON)" -m pytest tests/mom_layers/test_compile_matrix.py

bench:
	mkdir -p runs
	"$(PYTHON)" tools/bench_kernels.py
	"$(PYTHON)" tools/bench_rules.py
	"$(PYTHON)" tools/bench_layers.py
	"$(PYTHON)" tools/bench_layers.py --lengths --plot runs/bench_lengths.png
	"$(PYTHON)" tools/bench_models.py
	"$(PYTHON)" tools/bench_decode.py --plot runs/bench_decode.png

# What RESULTS.md reports: trains what is missing, and writes its tables and pictures. QUICK=1 runs the same code with
# tiny models and leaves tools/measured and RESULTS.md alone.
results:
	"$(PYTHON)" tools/results.py $(if $(QUICK),--quick --output runs/results-quick) $(ARGUMENTS)

# The tables and pictures of the documentation that follow from the code and from tools/measured.
docs:
	"$(PYTHON)" tools/make_docs.py
	"$(PYTHON)" tools/plot_readme.py

lint:
	"$(PYTHON)" -m ruff check .
	"$(PYTHON)" -m ruff format --check .
	"$(PYTHON)" -c "from importlinter.cli import lint_imports_command; lint_imports_command()"

format:
	"$(PYTHON)" -m ruff check --fix .
	"$(PYTHON)" -m ruff format .
