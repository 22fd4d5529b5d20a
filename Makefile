# Both `make quickstart` and `make test` do all the set-up that a fresh machine needs.
PYTHON ?= python3
ENV := .venv
BIN := $(ENV)/bin

.PHONY: quickstart test test-all format docs clean

quickstart: $(ENV)/.quickstart-ready
	$(BIN)/puna run recipes/quickstart.toml

test: $(ENV)/.dev-ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -m "not slow and not gpu"

# With the tests that take longer than a minute.
test-all: $(ENV)/.dev-ready
	$(BIN)/pytest

format: $(ENV)/.dev-ready
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

docs: $(ENV)/.dev-ready
	$(BIN)/python docs/generate.py

# The native kernels are compiled on installation, so a change of theirs installs anew.
SOURCES := pyproject.toml $(wildcard puna/kernels/*.cpp puna/kernels/*.inl)

$(ENV)/.quickstart-ready: $(SOURCES)
	$(PYTHON) -m venv $(ENV)
	$(BIN)/pip install --quiet --editable ".[curate,serve,report]"
	@touch $@

$(ENV)/.dev-ready: $(SOURCES)
	$(PYTHON) -m venv $(ENV)
	$(BIN)/pip install --quiet --editable ".[dev]"
	@touch $@ $(ENV)/.quickstart-ready

clean:
	rm -rf $(ENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
