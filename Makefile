# The two commands that matter: `make demo` and `make test`. Each makes .venv and installs what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
# Two spinning thread pools on two cores collapse; every process keeps to one thread.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: demo test lint check test-slow fuzz fuzz-smoke bench tables bases adapters golden clean

demo: $(VENV)/full
	$(BIN)/lora-convert demo

test: lint check

lint: $(VENV)/full
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: $(VENV)/full
	$(ONE_THREAD) $(BIN)/pytest -n $(WORKERS) --dist loadgroup -m "not slow"

test-slow: $(VENV)/full
	$(ONE_THREAD) $(BIN)/pytest -n $(WORKERS) -m slow

# A coverage-guided fuzzer for each reader (Linux on x86_64), for so many seconds each. Corpus and finds: build/fuzz.
FUZZ_SECONDS ?= 3600
fuzz: $(VENV)/fuzz
	$(BIN)/python -m fuzz.seeds build/fuzz
	for target in headers pickles pictures; do \
		$(ONE_THREAD) $(BIN)/python -m fuzz.run $$target build/fuzz -max_total_time=$(FUZZ_SECONDS) || exit; \
	done

# What CI has time for: one minute in all.
fuzz-smoke:
	$(MAKE) fuzz FUZZ_SECONDS=20

bench: $(VENV)/full
	$(BIN)/python benchmarks/convert.py
	$(BIN)/python benchmarks/lycoris.py
	$(BIN)/python benchmarks/merge.py

tables: $(VENV)/full
	$(BIN)/python -m lora_convert.runtime.tables

# Train the embedded base models again, from nothing: an autoencoder, then both models side by side, about 90 minutes.
BASES := lora_convert/runtime/bases
TRAINED := build/bases
bases: $(VENV)/full
	mkdir -p $(TRAINED)
	$(ONE_THREAD) $(BIN)/python -m training.autoencoder $(TRAINED)/vae
	$(ONE_THREAD) $(BIN)/python -m training.denoiser tiny-sd15 $(TRAINED)/vae $(BASES)/tiny-sd15 & \
	$(ONE_THREAD) $(BIN)/python -m training.denoiser tiny-sdxl $(TRAINED)/vae $(BASES)/tiny-sdxl; wait
	for base in tiny-sd15 tiny-sdxl; do \
		$(ONE_THREAD) $(BIN)/python -m training.score $(BASES)/$$base --sheet docs/pictures/$$base.png; \
	done

# The adapters among the fixtures: trained on these bases by peft and LyCORIS, and of every kind with random values; and
# the embeddings that are trained on them.
adapters: $(VENV)/full
	$(ONE_THREAD) $(BIN)/python -m training.adapters fixtures/tiny
	$(ONE_THREAD) $(BIN)/python -m training.kinds fixtures/tiny/kinds
	$(ONE_THREAD) $(BIN)/python -m training.embeddings fixtures/embeddings/tiny

golden: $(VENV)/full
	$(ONE_THREAD) $(BIN)/lora-convert golden record fixtures/golden/suite.toml --update

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lora-convert needs Python 3.11 or newer; name one with: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/light: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/full: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,images,runtime]"
	@touch $@ $(VENV)/light

$(VENV)/fuzz: $(VENV)/full
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[fuzz]"
	@touch $@

clean:
	rm -rf $(VENV) build/fuzz lora-convert-demo .mypy_cache .pytest_cache .ruff_cache
