# make demo | space | test | test-portable | faults | contracts | docs | lint | format | types | bench | clean | distclean
#
# Every target installs its dependencies into ./.venv: the first run downloads packages for some minutes, later runs start
# at once, and a change of pyproject.toml or constraints.txt triggers a new installation.
# All paths are relative, so the name of the folder may contain spaces.

# The interpreter that creates the environment: `make PYTHON=/some/python test` sets it; the default is the first of
# these that runs and is new enough.
PYTHON ?=
PYTHONS := $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python)

VENV   := .venv
PY     := $(VENV)/bin/python
INPUTS := pyproject.toml constraints.txt

DEMO_ARGS  ?=
SPACE_ARGS ?=
TEST_ARGS  ?=
FAULTS_ARGS ?=
BENCH      ?= unet sampling
BENCH_ARGS ?=

.PHONY: help demo space test test-portable faults contracts docs lint format types bench clean distclean
# The thousands of lines of tests and sources are compiled once, not again by each process that a test starts.
unexport PYTHONDONTWRITEBYTECODE
.DELETE_ON_ERROR:
.NOTPARALLEL:  # two simultaneous installations would break the environment

help:
	@echo 'make demo      fine-tune the small model in spaces/model to another style, with samples before and after'
	@echo 'make space     serve the Space of spaces/ on this machine (SPACE_ARGS="--port 7860")'
	@echo 'make test      run the tests (TEST_ARGS="-k scheduler" is passed to pytest)'
	@echo 'make test-portable  run the numerical tests with other CPU instructions, one thread and perturbed last bits'
	@echo 'make faults    kill, starve and damage training runs, resume them, and compare (FAULTS_ARGS=--short for minutes)'
	@echo 'make contracts run the common tests from a checkout of diffusers on our classes (DIFFUSERS_REPO=...)'
	@echo 'make docs      build the documentation as a site in outputs/site, and check its links'
	@echo 'make lint      check style and layout (changes nothing)'
	@echo 'make format    fix style and layout'
	@echo 'make types     check types with mypy'
	@echo 'make bench     compare speed and memory with diffusers (BENCH="unet sampling" BENCH_ARGS=...)'
	@echo 'make clean     delete the output of builds and tests; `make distclean` also deletes .venv'

demo: $(VENV)/.installed-train
	$(PY) training/demo.py $(DEMO_ARGS)

space: $(VENV)/.installed-space
	$(PY) spaces/app.py $(SPACE_ARGS)

test: $(VENV)/.installed-test
	$(PY) -m pytest -n 2 -q $(TEST_ARGS)

# The numerical tests with other kernels of torch, oneDNN and MKL, with one thread, and with noise of the size of rounding
# errors (tests/jitter.py): a test that depends on the last bits of one processor fails here.
OTHER_KERNELS := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=COMPATIBLE OMP_NUM_THREADS=1
JITTER        ?= 0
NUMBERS       := $(addprefix tests/,ops models schedulers conditioning conversion pipelines evaluation \
  $(addprefix data/test_,captions_lists.py control_data.py embedding_columns.py latents.py masks.py) \
  $(addprefix training/test_,autoencoder_losses.py contrastive.py ema.py golden_losses.py image_embeddings.py image_measures.py images.py \
  losses.py metrics.py power_ema.py \
  steps.py timestep_samplers.py train_latents.py train_latents_tasks.py))

test-portable: $(VENV)/.installed-test
	$(OTHER_KERNELS) $(PY) -m pytest -n 2 -q -m 'not slow' --jitter $(JITTER) $(NUMBERS) $(TEST_ARGS)

# The first table of docs/reliability.md; without arguments also the tests that try more cases of hostile input than
# `make test` does.
faults: $(VENV)/.installed-test
	$(PY) tests/faults/faults.py $(FAULTS_ARGS)
	$(if $(FAULTS_ARGS),,$(PY) -m pytest -n 2 -q -m faults)

# Dependencies of diffusers' tests. They are installed separately, so that the environment matches constraints.txt.
contracts: $(VENV)/.installed-test
	@test -n "$(DIFFUSERS_REPO)" || { echo 'error: set DIFFUSERS_REPO to a checkout of diffusers: make contracts DIFFUSERS_REPO=...' >&2; exit 1; }
	$(PY) -m pip install --disable-pip-version-check --quiet --upgrade --no-deps --target $(VENV)/contracts \
	  parameterized requests-mock
	PYTHONPATH="$(VENV)/contracts" DIFFUSERS_REPO="$(DIFFUSERS_REPO)" \
	  $(PY) -m pytest -n 2 -q tests/diffusers_contracts $(TEST_ARGS)

# Without a notice of the theme about its successor (see the extra `docs` in pyproject.toml).
docs: $(VENV)/.installed-docs
	$(PY) docs/site/prepare.py
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo 'Open outputs/site/index.html in a browser.'

lint: $(VENV)/.installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/.installed-dev
	$(PY) -m ruff check --fix --exit-zero .
	$(PY) -m ruff format .

types: $(VENV)/.installed-dev
	$(PY) -m mypy

bench: $(VENV)/.installed-test
	@failed=0; for name in $(BENCH); do \
	  $(PY) benchmarks/bench_$$name.py $(BENCH_ARGS) || failed=1; \
	done; exit $$failed

# The extras that each extra includes (see pyproject.toml).
HELD_train := train
HELD_space := space
HELD_test  := train space test
HELD_dev   := train space test dev
HELD_docs  := docs

# setuptools is pinned and installed first, because the build below is not isolated: an isolated one would use the newest.
$(VENV)/.installed-%: $(INPUTS) | $(VENV)/.created
	@echo 'Installing diffusers-adm[$*] into $(VENV) ...'
	$(PY) -m pip install --disable-pip-version-check --quiet -c constraints.txt setuptools
	$(PY) -m pip install --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[$*]'
	@touch $(HELD_$*:%=$(VENV)/.installed-%)

# A stamp of its own, so that an environment whose creation was interrupted is created again.
$(VENV)/.created:
	@for python in $(PYTHONS); do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "Creating $(VENV) with $$("$$python" --version)"; \
	    "$$python" -m venv --clear $(VENV) && touch $@ && exit 0; \
	    echo 'error: `'"$$python"' -m venv` failed; on Debian and Ubuntu, install the package python3-venv.' >&2; \
	    exit 1; \
	  fi; \
	done; \
	echo 'error: diffusers-adm needs Python 3.11 or newer, and none was found among: $(PYTHONS)' >&2; \
	echo '       Name one with `make PYTHON=/path/to/python3.12 ...`.' >&2; \
	exit 1

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -path ./$(VENV) -prune -o -path ./.git -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
