# `make demo` runs the whole pipeline on the embedded default; `make test` runs the tests.
# Both make a virtual environment first, from the pinned versions in constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Nothing here needs a hub: a call to one would be a bug, so it fails instead of hanging.
export HF_HUB_OFFLINE := 1

# Test processes share the cores: one thread each, and none that waits in a loop.
SIDE_BY_SIDE := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
# The kernels of PyTorch, oneDNN, MKL and FAISS.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 FAISS_OPT_LEVEL=avx2
QUICK := "not slow and not gpu and not faults"

.PHONY: demo test test-avx2 faults coverage slow check rules fix docs install

demo: install ## everything from texts to an exported student, the table, and a search by that student
	@echo "about 5 minutes on two quiet cores that multiply bfloat16, twice that on two that do not, longer beside other work"
	dvc repro
	@echo
	@teachonce report
	@echo
	@echo '$$ teachonce search "read a table from a text file"'
	@teachonce search "read a table from a text file"

test: install ## the quick tests; ARGS for pytest
	$(SIDE_BY_SIDE) pytest -q -n auto -m $(QUICK) $(ARGS)

test-avx2: install ## the quick tests on the kernels of a processor without AVX-512 and bfloat16
	$(AVX2) $(MAKE) test

faults: install ## thousands of counted faults against the store: kills, power loss, I/O errors, rot, malice
	$(SIDE_BY_SIDE) pytest -q -n auto --dist worksteal -m "faults and not gpu" tests/faults

coverage: ## `make test`; fails if it leaves out a line or branch of storage/
	$(MAKE) test ARGS="--cov=storage --cov-branch --cov-report=term-missing:skip-covered --cov-fail-under=100"

slow: install $(VENV)/extras $(VENV)/docs ## tests with a real teacher, DVC repositories, a browser and new environments
	$(SIDE_BY_SIDE) pytest -q -n 2 --dist loadfile -m "slow and not gpu and not faults"

check: rules test ## what a change must pass before a review, fastest failure first

rules: install ## formatting, lint, types, direction of imports
	ruff format --check .
	ruff check .
	mypy
	lint-imports

fix: install ## what can be repaired by machine
	ruff check --fix .
	ruff format .

docs: $(VENV)/docs ## the pages as a site, site/index.html; warnings are errors
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

install: $(VENV)/installed

# torch comes first, alone and pinned: whichever build of that version pip is set up to find (CPU or CUDA)
# is kept by everything after it.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[cpu,demo,dvc,onnx,dev]"
	touch $@

# What only the slow tests need of the extras.
$(VENV)/extras: $(VENV)/installed
	$(BIN)/pip install -q -c constraints.txt -e ".[mteb,openvino,ray,s3]" accelerate ipykernel model2vec "moto[server,s3]" nbconvert polars tensorboard
	touch $@

$(VENV)/docs: $(VENV)/installed
	$(BIN)/pip install -q -c constraints.txt -e ".[docs]"
	touch $@
