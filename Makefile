# make demo    build the demo retriever from the built-in model and world, and show its table
# make test    all tests (CPU, no network beyond the package registry)
# make test-families  the tests of model families whose processors need torchvision
# make check   format, lint and types
# Each makes its own virtual environment in .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCHVISION := $(VENV)/torchvision

.PHONY: demo test test-families check clean

$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/patch-retriever build -o demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal

# In a folder of its own, which only these tests see: tests/families/vision_operators.py says why.
$(TORCHVISION)/.ready: $(READY)
	rm -rf $(TORCHVISION)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt \
		--no-deps --target $(TORCHVISION) torchvision num2words
	touch $@

test-families: $(TORCHVISION)/.ready
	TORCHVISION_FOR_TESTS=$(abspath $(TORCHVISION)) $(BIN)/python -m pytest -n 2 -m torchvision

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo
