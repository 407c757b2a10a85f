# `make demo` runs the whole pipeline on the embedded default; `make test` runs the tests.
# Both make a virtual environment first, from the pinned versions in constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Nothing here needs a hub: a call to one would be a bug, so it fails instead of hanging.
export HF_HUB_OFFLINE := 1

.PHONY: demo test faults coverage slow check rules fix install

demo: install ## everything from texts to an exported student, the table, and a search by that student
	dvc repro
	@echo
	@teachonce report
	@echo
	@echo '$$ teachonce search "read a table from a text file"'
	@teachonce search "read a table from a text file"

test: install ## the quick tests
	pytest -q -n auto -m "not slow and not gpu and not faults"

faults: install ## thousands of counted faults against the store: kills, power loss, I/O errors, rot, malice
	pytest -q -n auto --dist worksteal -m "faults and not gpu" tests/faults

# The tests that read and write the store in their own process.
STORE_TESTS := $(addprefix tests/test_,$(addsuffix .py,storage upkeep remote vectors reuse import probe plan readers \
               engine stage_embed stage_mine stage_split stage_shard))

coverage: install ## every line and branch of storage/ is run by a quick test
	coverage run --branch --source=storage -m pytest -q -m "not slow and not gpu and not faults" $(STORE_TESTS)
	coverage report --show-missing --fail-under=100

slow: install $(VENV)/extras ## tests with a real teacher, DVC repositories, a browser and new environments
	pytest -q -m "slow and not gpu and not faults"

check: rules test ## what a change must pass before a review, fastest failure first

rules: install ## formatting, lint, types, direction of imports
	ruff format --check .
	ruff check .
	mypy
	lint-imports

fix: install ## what can be repaired by machine
	ruff check --fix .
	ruff format .

install: $(VENV)/installed

# torch comes first, alone and pinned: whichever build of that version pip is set up to find (CPU or CUDA)
# is kept by everything after it.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[cpu,demo,dvc,dev]"
	touch $@

# What only the slow tests need of the extras.
$(VENV)/extras: $(VENV)/installed
	$(BIN)/pip install -q -c constraints.txt -e ".[mteb,onnx,ray,s3]" accelerate "moto[server,s3]" polars tensorboard
	touch $@
