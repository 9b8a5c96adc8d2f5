# make demo       a photograph through ResNet-50, before and after (IMAGE=path WEIGHTS=path)
# make test       the tests, 15 to 25 minutes on 2 cores; make test-all adds the slow ones and
#                 installs the libraries whose networks they run
# make lint       ruff, mypy, clang-format, import-linter and the limit of 500 lines a file;
#                 make format fixes what can be fixed
# make verify     every operation and network, compared with float64
# make bench      the benchmark results, their pictures and README's table (BENCH_ARGS=--quick)
# make asan       the operations' tests under AddressSanitizer
# make mutants    planted bugs, each of which a test must catch
#
# Every target works in a fresh clone: .venv is created if it is missing (PYTHON=python3.12 chooses).

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
TEST_CPP := $(shell find tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# Built without isolation: the extension is compiled against the torch that it runs with.
BUILD_REQUIRES := 'setuptools>=77' wheel 'torch>=2.11' ninja pybind11
# CuTe's headers, with which tests compare the simulator. Without dependencies: they are for CuTe's
# Python half, and torch has CUDA's bindings of its own.
HEADERS := 'nvidia-cutlass>=4.2,<5'

.DELETE_ON_ERROR:
.PHONY: demo test test-all lint format verify bench gpu asan mutants install clean

demo: $(INSTALLED)
	$(VENV)/bin/fused-resnet demo $(if $(IMAGE),'$(IMAGE)') $(if $(WEIGHTS),--weights '$(WEIGHTS)')

test: $(INSTALLED)
	$(PY) -m pytest -q -m 'not slow'

test-all: $(INSTALLED)
	$(PY) -m pip install -q --no-build-isolation -e '.[test,models]'
	$(PY) -m pytest -q

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP) $(TEST_CPP)
	$(VENV)/bin/lint-imports
	$(PY) tests/check_file_lengths.py

format: $(INSTALLED)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP) $(TEST_CPP)

verify: $(INSTALLED)
	$(VENV)/bin/fused-resnet verify

bench: $(INSTALLED)
	$(PY) -m pip install -q --no-build-isolation -e '.[bench]'
	$(PY) benchmarks/bench_models.py $(BENCH_ARGS)
	$(PY) benchmarks/bench_ops.py
	$(PY) benchmarks/readme_table.py

# On a machine with a GPU: with the installed packages, without a virtual environment or network.
gpu:
	$(PYTHON) benchmarks/gpu.py $(GPU_ARGS)

asan: $(INSTALLED)
	PYTHON=$(abspath $(PY)) bash tests/asan.sh

mutants: $(INSTALLED)
	$(PY) tests/mutants.py

install: $(INSTALLED)

$(PY):
	$(PYTHON) -m venv $(VENV)

# The extension is compiled again when a source changes; Python files are used in place.
$(INSTALLED): setup.py pyproject.toml $(CPP) | $(PY)
	$(PY) -m pip install -q $(BUILD_REQUIRES)
	$(PY) -m pip install -q --no-deps $(HEADERS)
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m pip install --no-build-isolation -e '.[test,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info fused_resnet/_C*.so
