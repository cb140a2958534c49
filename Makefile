# `make demo` and `make test` need a machine with Python 3.11 or newer, pip and g++; they make everything else themselves.
PYTHON ?= python3
VENV ?= .venv
MODEL ?= smollm2
BENCH_MODELS ?= smollm2 qwen0.5
PEERS ?= llama.cpp,openvino,vllm,transformers

BIN := $(VENV)/bin
RESULTS := benchmarks/results
DOCUMENT := src/firstlight/evaluate/texts/moby-dick-chapter-87.txt
QUESTION := Which straits does the Pequod sail through?

# Tests side by side, one thread each; those that need two threads ask for them.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

NATIVE := CMakeLists.txt $(wildcard csrc/*)

.PHONY: help demo test test-all sanitize bench-peers lint docs wheel clean
.DEFAULT_GOAL := help

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(VENV)/installed  ## install, fetch the model, answer a question about a long document
	$(BIN)/firstlight models pull $(MODEL)
	$(BIN)/firstlight run $(MODEL) -f $(DOCUMENT) -p "$(QUESTION)" --max-tokens 60

test: $(VENV)/tested lint  ## install, then lint, types and all tests
	$(BIN)/firstlight models pull $(MODEL)
	HYPOTHESIS_PROFILE=ci $(PYTEST)

test-all: $(VENV)/tested lint  ## the same with many more generated examples
	$(BIN)/firstlight models pull $(MODEL)
	HYPOTHESIS_PROFILE=long $(PYTEST)

# The checked module takes the usual one's place until the end, however that comes: its tests alone can load it.
# FIRSTLIGHT_ISA=avx2 make sanitize: that variant alone.
sanitize: $(VENV)/tested  ## the kernels' tests under the address and undefined-behaviour sanitizers
	trap '$(BIN)/pip install --quiet --editable .' EXIT; trap 'exit 130' INT TERM; \
	$(BIN)/pip install --editable . -C cmake.define.FIRSTLIGHT_SANITIZE=ON -C build-dir=build/sanitize && \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 HYPOTHESIS_PROFILE=ci \
		$(BIN)/python -m pytest tests/parity tests/unit/test_kv_int8.py -k "cpu or test_blocks or test_tape or test_kv_int8"

# The peers are installed under the cache directory, some gigabytes of them, and stay there for the next time.
bench-peers: $(VENV)/installed  ## measure the peers beside this engine on two models, and draw the results
	for model in $(BENCH_MODELS); do \
		$(BIN)/firstlight bench ttft $$model --against $(PEERS) --results $(RESULTS)/ttft.jsonl || exit 1; done
	$(BIN)/python benchmarks/picture.py $(RESULTS)/ttft.jsonl $(RESULTS)

lint: $(VENV)/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed  ## write the generated pages and the trees of files anew
	$(BIN)/python -m firstlight.cli.docs

wheel: $(VENV)/tested  ## build dist/*.whl
	$(BIN)/python -m build --wheel

clean:  ## remove what these targets made, but for fetched models
	rm -rf $(VENV) build dist

# torch comes first and alone, so that nothing that depends on it can choose another version.
define install
	$(PYTHON) -m venv $(VENV) || ($(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip)
	$(BIN)/pip install torch==2.13.0
	$(BIN)/pip install --editable '.$(1)'
endef

$(VENV)/installed: pyproject.toml $(NATIVE)
	$(call install)
	touch $@

# Not after the other: every installation compiles the kernels anew.
$(VENV)/tested: pyproject.toml $(NATIVE)
	$(call install,[test])
	touch $(VENV)/installed $@
