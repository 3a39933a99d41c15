# The newcomer's commands. `make train` and `make test` need Python 3.11 or newer, pip, git, make and gcc; the first call sets up .venv.
# With TORCH=2.11 each does so in .venv-torch2.11, with the oldest torch that is supported.

PYTHON ?= python3
ACCELERATORS ?= 2
VENV := .venv$(TORCH:%=-torch%)
CONSTRAINTS := constraints$(TORCH:%=-torch%).txt
ifeq ($(wildcard $(CONSTRAINTS)),)
$(error TORCH is $(TORCH); expected $(patsubst constraints-torch%.txt,%,$(wildcard constraints-torch*.txt)), or nothing for the newest that is supported)
endif
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Files and folders; with an older torch what may differ there, else everything.
TESTS = $(if $(TORCH),tests/unit tests/numerics tests/distributed)

.PHONY: train test test-slow test-gpu lint types format setup clean

# The main job: a small Bi-Real Net on the embedded images, three minutes on two cores. Options: make train ARGS="--epochs 4"
train: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed --num_accelerators $(ACCELERATORS) launch/train.py --config fashion_quickstart $(ARGS)

# Everything that this machine can run in minutes, a file a core at a time, whole jobs first. One test: make test ARGS="-n 0 -k golden"
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not multinode and not gpu" $(TESTS) $(ARGS)

# What takes minutes, or root and network namespaces.
test-slow: $(READY)
	$(BIN)/python -m pytest -m "(slow or multinode) and not gpu" $(TESTS) $(ARGS)

# What needs a CUDA device; each test is skipped where there is none. BITFLEET_GPU_DRY_RUN=1 make test-gpu runs it on the CPU, tiny.
test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu tests/gpu $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy src

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(READY)

# The pins are tested; DS_BUILD_OPS=0: no compiled DeepSpeed op is used. Done again when the requirements change.
$(READY): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[dali-cu13,dev]"
	touch $(READY)

clean:
	rm -rf .venv .venv-torch* build dist *.egg-info src/*.egg-info .mypy_cache .pytest_cache .ruff_cache
