# Two commands: `make alltoall` runs the main job on 64 ranks, `make test` the whole test suite.
# Both make .venv with everything they need, MPI included; a second call installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RANKS ?= 64
BUILD_FROM := pyproject.toml $(wildcard csrc/CMakeLists.txt csrc/*/*)
# With `activate` in effect mpirun is the one of this environment, whatever else is installed.
ACTIVATE := . $(BIN)/activate &&

# Debian keeps what venv needs to install pip in a package of its own.
WITHOUT_VENV_PACKAGE = { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	$(PYTHON) -m pip --python $(BIN)/python install pip; }

.PHONY: alltoall test test-threads test-mpi test-gpu lint figures clean

alltoall: $(VENV)/.run
	$(ACTIVATE) mpirun -n $(RANKS) python bench/alltoall.py $(ARGS)

test: test-threads test-mpi

test-threads: $(VENV)/.test
	$(ACTIVATE) python -m pytest -m "not mpi"

test-mpi: $(VENV)/.test
	$(ACTIVATE) mpirun -n 4 python -m pytest -m mpi --only-mpi
	$(ACTIVATE) mpirun -n 8 python -m pytest -m mpi --only-mpi

# For a machine with GPUs, in an environment that has torch with CUDA and moecomm installed. A failure that depends on
# the random numbers of a run shows with some of so many seeds.
SEEDS ?= 20
test-gpu:
	$(PYTHON) tests/programs/gating_cuda.py --seeds $(SEEDS)
	$(PYTHON) tests/programs/direct.py --threads 1 --seeds $(SEEDS)
	torchrun --nproc-per-node gpu tests/programs/direct.py --seeds $(SEEDS)
	torchrun --nproc-per-node gpu tests/programs/nccl.py --seeds $(SEEDS)

lint: $(VENV)/.test
	$(ACTIVATE) ruff check . && ruff format --check . && mypy && lint-imports

figures: $(VENV)/.test
	$(ACTIVATE) python docs/make_figures.py

$(VENV)/.run: $(BUILD_FROM)
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV) || $(WITHOUT_VENV_PACKAGE)
	$(BIN)/python -m pip install -e '.[mpich,bench]'
	touch $@

# torch first and by its exact version: a plain `torch` may bring gigabytes of CUDA libraries.
$(VENV)/.test: $(VENV)/.run
	$(BIN)/python -m pip install torch==2.13.0
	$(BIN)/python -m pip install -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build
