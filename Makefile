# Two commands on a fresh machine with Python 3.11: `make benchmark` and `make test`.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV ?= .venv
CORES ?= $(shell nproc)
EXPERIMENT ?= config/experiments/quickstart.yaml
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help venv benchmark status cost doctor explain gc publish obtain report test test-all test-long test-gpu lint format \
	lock pin clean

help:
	@echo "make benchmark  run $(EXPERIMENT) and name the report (EXPERIMENT=..., CORES=...)"
	@echo "make status     how each cell of EXPERIMENT stands, also while it runs"
	@echo "make report     the report of what has finished, also while it runs"
	@echo "make explain    why each step of EXPERIMENT would run"
	@echo "make gc         list results that no experiment names any more; removes nothing"
	@echo "make publish    share what EXPERIMENT has finished: DVC's remote and one commit"
	@echo "make obtain     get what others shared of EXPERIMENT (ALL=1: every checkpoint)"
	@echo "make cost       jobs, GPU hours, memory and disk of EXPERIMENT on a cluster"
	@echo "make doctor     check profiles/slurm against the cluster before submitting EXPERIMENT"
	@echo "make test       the short tests (at most 10 minutes)"
	@echo "make test-all   all tests (at most 50 minutes)"
	@echo "make test-gpu   the checks that need a GPU"
	@echo "make lint       ruff, mypy, snakefmt"
	@echo "make lock       write requirements.lock and environment.yml from the environment"
	@echo "make pin        write the commits of unpinned hub revisions into the catalogues"

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r requirements.lock
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

venv: $(READY)

benchmark: $(READY)
	$(BIN)/snakemake --cores $(CORES) --config experiment=$(EXPERIMENT)
	@echo "report: $(CURDIR)/results/report.html"

status: $(READY)
	@$(BIN)/python -P workflow_scripts/status.py --experiment $(EXPERIMENT) --catalogue config

report: $(READY)
	@$(BIN)/python -P workflow_scripts/report.py --experiment $(EXPERIMENT) --catalogue config \
		--out results --partial

cost: $(READY)
	@$(BIN)/python -P workflow_scripts/cost.py --experiment $(EXPERIMENT)

explain: $(READY)
	@$(BIN)/python -P workflow_scripts/explain.py --experiment $(EXPERIMENT)

gc: $(READY)
	@$(BIN)/python -P workflow_scripts/gc.py

publish: $(READY)
	@$(BIN)/python -P workflow_scripts/publish.py --experiment $(EXPERIMENT)

obtain: $(READY)
	@$(BIN)/python -P workflow_scripts/obtain.py --experiment $(EXPERIMENT) $(if $(ALL),--all)

doctor: $(READY)
	@$(BIN)/python -P workflow_scripts/doctor.py --experiment $(EXPERIMENT)

# Two workers: most tests keep one core busy, those on a SLURM cluster or a remote mostly wait. A
# file's tests stay together, since they share what takes long to set up.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not long and not gpu" --durations=10

test-all: test test-long

# The longer tier alone: what `make test` has not run already. The tests on a SLURM cluster mostly
# wait for it, so the others run beside them.
SLURM_TESTS := tests/test_slurm.py tests/test_doctor.py
SLURM_LOG := .pytest_cache/slurm.log
test-long: $(READY)
	@mkdir -p $(dir $(SLURM_LOG)); \
	$(BIN)/python -m pytest -m "long and not gpu" --durations=10 $(SLURM_TESTS) >$(SLURM_LOG) 2>&1 & \
	slurm=$$!; \
	$(BIN)/python -m pytest -m "long and not gpu" --durations=10 $(SLURM_TESTS:%=--ignore=%); \
	others=$$?; wait $$slurm; slurm=$$?; cat $(SLURM_LOG); exit $$((others | slurm))

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu -r fE

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/snakefmt --check Snakefile rules

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile rules

lock:
	$(BIN)/python -P workflow_scripts/lock.py

pin: $(READY)
	$(BIN)/python -m prunelib.data.pin config/models.yaml config/texts.yaml

clean:
	rm -rf results logs .snakemake
