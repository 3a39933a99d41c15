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
# Files and folders to test: all; with an older torch the parts that depend on it.
TESTS = $(if $(TORCH),tests/unit tests/numerics tests/distributed)

.PHONY: train test test-slow test-gpu lint types format setup libbitfleet_packed clean

# The main job: a small Bi-Real Net on the embedded images, three to five minutes on two cores. Options: make train ARGS="--epochs 4"
train: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed --num_accelerators $(ACCELERATORS) launch/train.py --config fashion_quickstart $(ARGS)

# All tests that need minutes and no special machine, one file per core at a time. One test: make test ARGS="-n 0 -k golden"
# Threads of jobs that share a core wait without spinning.
test: $(READY)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder --durations 20 \
		-m "not slow and not multinode and not gpu" $(TESTS) $(ARGS)

# Tests of many minutes, or that need root and network namespaces.
test-slow: $(READY)
	$(BIN)/python -m pytest -m "(slow or multinode) and not gpu" $(TESTS) $(ARGS)

# Tests that need a CUDA device; skipped without one. BITFLEET_GPU_DRY_RUN=1 make test-gpu runs them on the CPU, tiny.
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
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[dali-cu13,dev,export]"
	touch $(READY)

# The C library that runs exported networks, shared and static, and an example: build/packed_example PROGRAM IMAGE.ppm
# For a device: make libbitfleet_packed CC=aarch64-linux-gnu-gcc; OPENMP= where the compiler has none: one thread.
BUILD ?= build
CFLAGS ?= -O3
OPENMP ?= -fopenmp
PACKED := models/packed
# The first two decide how floats are rounded: as in training.
PACKED_FLAGS = -std=c11 -ffp-contract=off -fno-math-errno -fno-strict-aliasing -fPIC -Wall -Wextra -Wno-unknown-pragmas -Werror $(CFLAGS) $(OPENMP)

libbitfleet_packed: $(BUILD)/libbitfleet_packed.so $(BUILD)/libbitfleet_packed.a $(BUILD)/packed_example

# Changes with the compiler and its options: what another one has built is built again.
$(BUILD)/compiler: FORCE
	@mkdir -p $(BUILD)
	@echo '$(CC) $(PACKED_FLAGS) $(LDFLAGS)' | cmp -s - $@ || echo '$(CC) $(PACKED_FLAGS) $(LDFLAGS)' > $@
FORCE:

$(BUILD)/packed.o: $(PACKED)/packed.c $(wildcard $(PACKED)/*.h) $(BUILD)/compiler
	$(CC) $(PACKED_FLAGS) -c $< -o $@

$(BUILD)/libbitfleet_packed.so: $(BUILD)/packed.o
	$(CC) -shared $(CFLAGS) $(OPENMP) $< -o $@ $(filter-out -static,$(LDFLAGS)) -lm

$(BUILD)/libbitfleet_packed.a: $(BUILD)/packed.o
	$(AR) rcs $@ $<

$(BUILD)/packed_example: $(PACKED)/example.c $(PACKED)/packed.h $(BUILD)/libbitfleet_packed.a
	$(CC) $(PACKED_FLAGS) $< $(BUILD)/libbitfleet_packed.a -o $@ $(LDFLAGS) -lm

clean:
	rm -rf .venv .venv-torch* build dist *.egg-info src/*.egg-info .mypy_cache .pytest_cache .ruff_cache
