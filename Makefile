# Both `make quickstart` and `make test` do all the set-up that a fresh machine needs.
PYTHON ?= python3
ENV := .venv
BIN := $(ENV)/bin
# Processes that run tests side by side; each takes about 2 GB of memory.
WORKERS ?= 2

.PHONY: quickstart test test-all format docs clean

quickstart: $(ENV)/.quickstart-ready
	$(BIN)/puna run recipes/quickstart.toml

test: $(ENV)/.dev-ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n $(WORKERS) -m "not slow and not gpu"

# And those that take longer than a minute: one at a time, for many start processes of their own.
test-all: test
	$(BIN)/pytest -m "slow or gpu"

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
