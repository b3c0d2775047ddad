# Two commands do all the set-up on a machine with python3 (>= 3.11) and make:
#   make quickstart   convert a torch MACE, fine-tune it, judge it
#   make test         the test suite (installs torch and mace-torch for the parity tests)

PYTHON ?= python3
VENV ?= .venv
# With no torch installed pip would fetch the newest CUDA build to satisfy mace-torch.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
PYTEST_ARGS ?= -n 2 --dist loadfile

.PHONY: quickstart test lint clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[plots]'
	touch $@

$(VENV)/.test-installed: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test,torch]'
	touch $@

quickstart: $(VENV)/.installed
	@test ! -e quickstart || { echo "quickstart/ exists; remove it or rename it to run again" >&2; exit 1; }
	$(BIN)/jaxft convert benchmarks/data/gfn2_small.model quickstart/base.jaxft
	$(BIN)/jaxft finetune configs/quickstart.yaml

test: $(VENV)/.test-installed
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info
