# `make demo` and `make test` set up what they need in .venv; nothing else is required but Python and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test soak gpu-check sanitize emulate setup lint clean

setup: $(VENV)/.ready

# torch first and alone: its CPU build is on the index under the exact version, a range may bring a CUDA build
$(VENV)/.ready: pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/*.* native/kernels/*.*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/sieve compare --demo --html sieve-report.html

test: setup lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not long"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not long" tests/triton

soak: setup
	$(BIN)/python -m pytest -m long
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m long tests/triton

# the contract on a CUDA device, with a record in bench/results/; without a device it says so
gpu-check: setup
	$(BIN)/python tests/gpu/check.py

# C++ tests of the kernels: addresses and undefined behaviour, then threads; nothing but CMake and a compiler is needed
SANITIZERS := address,undefined thread
# the instruction sets that this machine can run: the others would be compiled for nothing
has = $(shell grep -qwE '$(1)' /proc/cpuinfo && echo '$(2);')
HERE = portable;$(call has,avx2,avx2)$(call has,avx512bw,avx512)$(call has,avx512_vnni,vnni)$(call has,amx_bf16,amx)
sanitize:
	for s in $(SANITIZERS); do \
		cmake -S . -B build/sanitize-$${s%%,*} -DSIEVE_TESTS=ON -DSIEVE_SANITIZE=$$s "-DSIEVE_LEVELS=$(HERE)" && \
		cmake --build build/sanitize-$${s%%,*} --parallel 2 && build/sanitize-$${s%%,*}/native_tests || exit 1; \
	done

# the kernels for instructions that this machine lacks, computed in software, slowly: AMX, or AVX-512 and all above it
EMULATED = $(if $(call has,avx512_bf16,yes),amx,avx512)
emulate: setup
	cmake -S . -B build/emulate -DSIEVE_TESTS=ON -DSIEVE_EMULATE=$(EMULATED)
	cmake --build build/emulate --parallel 2 && build/emulate/native_tests
	$(BIN)/python -m pip install --quiet --no-deps --editable . --config-settings cmake.define.SIEVE_EMULATE=$(EMULATED)
	passed=0; $(BIN)/python -m pytest -n 2 -m "not long" -k "avx512 or vnni or amx" || passed=1; \
	for level in avx512 vnni amx; do \
		SIEVE_LEVEL=$$level $(BIN)/python -m pytest -n 2 -m "not long" tests/test_huge_logits.py tests/test_whole_calls.py || passed=1; \
	done; \
	$(BIN)/python -m pip install --quiet --no-deps --editable . --config-settings cmake.define.SIEVE_EMULATE=; exit $$passed

lint: setup
	$(BIN)/ruff check --quiet src tests models docs
	$(BIN)/ruff format --check --quiet src tests models docs

clean:
	rm -rf $(VENV) build dist .hypothesis sieve-report.html
