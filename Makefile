# `make train` and `make test` each do all set-up first; a second run finds it done.
PYTHON ?= python3
TORCH ?= torch # e.g. TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
ARGS ?=
BIN := .venv/bin
READY := .venv/.ready

.PHONY: train test lint format types clean
train: $(READY)
	$(BIN)/gvu train $(ARGS)

test: lint
	$(BIN)/python -m pytest -q $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf .venv

# torch goes in first and under the constraints, so that nothing else can pull in another build of it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
