# One command each. `make demo` and `make test` set everything up on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test golden review bench lint docs format clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/piecework demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal

golden: $(STAMP)
	$(BIN)/piecework golden update

review: $(STAMP)
	$(BIN)/piecework golden review

bench: $(STAMP)
	$(BIN)/piecework bench

# mypy finds what codegen imports by the package's name, which the checkout has in $(VENV) alone.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/black --check --quiet .
	ln -sfn '$(CURDIR)' $(VENV)/piecework
	$(BIN)/mypy --strict --package piecework.codegen

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/black --quiet .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
