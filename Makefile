# `make demo` and `make test` do all the set-up on a fresh machine: a virtual environment, its packages, the native build.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# One torch for all tests; the library itself runs on every torch from 2.10 on.
TORCH ?= torch==2.13.0
# Every command of ours takes the environment's tools (cmake, ninja) before the system's.
export PATH := $(abspath $(BIN)):$(PATH)

NATIVE = $(wildcard csrc/*.* csrc/cpu/* csrc/cuda/*) CMakeLists.txt setup.py pyproject.toml
CPP = $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp csrc/cuda/* tests/cpp/*.cpp tests/cpp/cuda_host/*.h \
  tests/cpp/cuda_host/*.cpp)
PY = setup.py python tests benchmarks examples triton_kernels

.PHONY: demo test test-wide digests hostile lint format bench report sanitize aot gpu gpu-first gpu-rest clean

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip

# torch first: what depends on it then finds it there and fetches no other build.
$(VENV)/base: $(VENV)/bin/pip pyproject.toml
	$(BIN)/pip install -q "$(TORCH)" numpy
	$(BIN)/pip install -q "cmake>=3.24" ninja "pybind11>=2.13" "setuptools>=77" wheel
	touch $@

# The package with an extra of pyproject.toml, beside the torch that is there; again whenever a native source changes.
$(VENV)/extra-%: $(VENV)/base $(NATIVE)
	FASTPOOL_NATIVE=1 $(BIN)/pip install -q --no-build-isolation -e ".[$*]" "$(TORCH)"
	touch $@

demo: $(VENV)/extra-demo
	$(BIN)/fastpool demo $(if $(QUERY),--query "$(QUERY)")

test: $(VENV)/extra-test
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST)

# What takes minutes and seldom finds what `make test` does not: more machine code, installs, addresses of the
# CUDA kernels, every float32 of the elementary functions.
test-wide: $(VENV)/extra-test
	$(BIN)/python -m pytest -n 2 --dist worksteal --wide $(PYTEST)

# Bits of every result against those on record, on every backend that runs here; `make test` leaves Triton's interpreter out.
digests: $(VENV)/extra-test
	$(BIN)/python tests/digests.py

# Tries to break the library, for minutes: calls on guarded memory, damaged model folders, interrupted calls.
# HOSTILE="--seconds 600 --seed 7" passes options on; `make test` tries a few of each.
hostile: $(VENV)/extra-test
	PYTHONPATH=tests $(BIN)/python -m hostile $(HOSTILE)

lint: $(VENV)/extra-lint
	$(BIN)/ruff check $(PY)
	$(BIN)/ruff format --check $(PY)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/extra-lint
	$(BIN)/ruff check --fix $(PY)
	$(BIN)/ruff format $(PY)
	$(BIN)/clang-format -i $(CPP)

bench: $(VENV)/extra-bench
	$(BIN)/python -m benchmarks.run $(BENCH)

# docs/benchmarks.md and README's figures, from the result files under benchmarks/results/.
report: $(VENV)/extra-bench
	$(BIN)/python -m benchmarks.report

# Addresses and undefined behaviour, then races: over the kernels alone, in their test program (without torch's OpenMP,
# whose barriers the thread sanitizer does not know); then the whole library, inside Python, over the error table and the
# layouts. Leaks are not looked for there: the interpreter has its own.
TORCH_DIR = $(shell $(BIN)/python -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parent)")
CONFIGURE = cmake -S . -G Ninja -DFASTPOOL_WERROR=ON
sanitize: $(VENV)/extra-test
	$(CONFIGURE) -B build/thread -DFASTPOOL_SANITIZE=thread
	cmake --build build/thread
	build/thread/test_kernels
	$(CONFIGURE) -B build/address -DFASTPOOL_SANITIZE=address,undefined -DTORCH_DIR=$(TORCH_DIR) \
	  -Dpybind11_DIR=$(shell $(BIN)/python -m pybind11 --cmakedir) -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -DCMAKE_INSTALL_PREFIX=$(abspath build/address/package/fastpool)
	cmake --build build/address
	build/address/test_kernels
	rm -rf build/address/package && mkdir -p build/address/package
	cp -r python/fastpool build/address/package/ && cmake --install build/address
	LD_PRELOAD="$(shell gcc -print-file-name=libasan.so) $(shell gcc -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/address/package \
	  $(BIN)/python -m pytest -q -p no:cacheprovider tests/api/test_errors.py tests/kernels/test_bits.py \
	  -k "not reference and not requested_backend and not meanwhile"

# Every Triton variant for every kind of GPU, without one: about two hours each on two cores. AOT="cuda:90" and the
# command's own options narrow it down.
AOT ?= cuda:80 cuda:90 cuda:100 cuda:120 hip:gfx942
aot: $(VENV)/extra-test
	TRITON_INTERPRET=0 $(BIN)/fastpool aot $(AOT)

# Need a GPU and what is installed there; fetch nothing, and no GPU test may skip. gpu-first: builds for this GPU, is it
# right, how fast is it, in four minutes; gpu-rest: everything else, for SECONDS_LEFT (560) seconds. Results are written to
# OUT (gpu-out/) as they come. COMMIT names what is measured outside of a git checkout; ONLY="smoke native, tune" chooses
# stages by what their names hold.
gpu gpu-first gpu-rest:
	$(PYTHON) -m benchmarks.gpu_stages $(if $(filter gpu,$@),first rest,$(@:gpu-%=%)) $(if $(ONLY),--only "$(ONLY)")

clean:
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache python/*.egg-info *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -f python/fastpool/*.so python/fastpool/native_build.json
