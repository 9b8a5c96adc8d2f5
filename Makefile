# make demo       a photograph through ResNet-50, before and after (IMAGE=path WEIGHTS=path); with
#                 torchvision's trained weights if they are cached or can be downloaded
# make check      the tests of the inner loop, on the CPU: at most 3 minutes on 2 cores
# make test       what CI runs, with the CUDA simulator, Triton's interpreter and planted bugs: at most
#                 12 minutes on 2 cores once all is built
# make test-all   the slow ones too, and the libraries whose networks they run are installed
# make lint       ruff, mypy, clang-format, import-linter, imports of the package's root and the limit
#                 of 500 lines a file; make format fixes what can be fixed
# make verify     every operation and network, compared with float64
# make docs       the documentation as a site, in build/site/index.html
# make bench      the benchmark results, their pictures, and the tables of README and docs/
#                 (BENCH_ARGS=--quick)
# make gpu        on a machine with a card: builds for it, checks and measures everything in 560 s
#                 (GPU_ARGS=--rehearse runs every step without a card)
# make asan       the operations' tests under AddressSanitizer
# make mutants    planted bugs, each of which a test must catch; goes on where it was interrupted
#                 (MUTANTS='--kind cuda' plants those of one kind)
#
# Every target works in a fresh clone: .venv is created if it is missing (PYTHON=python3.12 chooses).

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
# The same without CUDA's kernels, which take most of the time to compile: enough for `make demo`
# and `make check`, which use the full build where there is one.
INSTALLED_CPU := $(VENV)/.installed-cpu
CHECKED := $(if $(wildcard $(INSTALLED)),$(INSTALLED),$(INSTALLED_CPU))
# A worker a core, and a thread a worker; a file's tests stay on one worker unless each is on its own
# (tests/conftest.py). Tests that are about threads ask for as many as they need.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --dist loadgroup
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
TEST_CPP := $(shell find tests examples -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# Built without isolation, which would download another torch for its headers.
BUILD_REQUIRES := 'setuptools>=77' wheel 'torch>=2.11' pybind11
# The extra `docs` of pyproject.toml, without this package.
DOCS_REQUIRES := 'mkdocs-material>=9.6,<10' 'mkdocstrings[python]>=1.0' 'latex2mathml>=3.78'
# CuTe's headers, with which tests compare the simulator. Beside the environment's packages and not
# among them: CuTe's Python half, which nothing here uses, needs packages that pip would miss.
HEADERS := 'nvidia-cutlass>=4.2,<5'
CUTE := $(VENV)/headers/cutlass_library

.DELETE_ON_ERROR:
.PHONY: demo check test test-all lint format verify docs bench gpu asan mutants install clean

demo: $(CHECKED)
	$(VENV)/bin/fused-resnet demo $(if $(IMAGE),'$(IMAGE)') $(if $(WEIGHTS),--weights '$(WEIGHTS)')

check: $(CHECKED)
	$(PYTEST) -m 'not thorough and not slow'

test: $(INSTALLED)
	$(PYTEST) -m 'not slow'

test-all: $(INSTALLED)
	$(PY) -m pip install -q --no-build-isolation -e '.[test,models]'
	$(PYTEST)

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP) $(TEST_CPP)
	$(VENV)/bin/lint-imports
	$(PY) tests/check_file_lengths.py
	$(PY) tests/check_root_imports.py

format: $(INSTALLED)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP) $(TEST_CPP)

verify: $(INSTALLED)
	$(VENV)/bin/fused-resnet verify

# The pages are read from the sources, which need not be compiled. mkdocs' theme announces its
# successor at every build.
docs: | $(PY)
	$(PY) -c 'import material, mkdocstrings_handlers.python, latex2mathml' 2>/dev/null || \
	    $(PY) -m pip install -q $(DOCS_REQUIRES)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

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
	$(PY) tests/run_mutants.py $(MUTANTS)

install: $(INSTALLED)

$(PY):
	$(PYTHON) -m venv $(VENV)

$(CUTE): | $(PY)
	$(PY) -m pip install -q --no-deps --target $(@D) $(HEADERS)

# The extension is compiled again when a source changes, at first by setup.py itself, whose progress
# pip would hide; Python files are used in place.
$(INSTALLED): export FUSED_RESNET_CUDA ?= nvcc
$(INSTALLED_CPU): export FUSED_RESNET_CUDA := 0
$(INSTALLED) $(INSTALLED_CPU): setup.py csrc/toolchain.py pyproject.toml $(CPP) | $(PY) $(CUTE)
	$(PY) -m pip install -q $(BUILD_REQUIRES)
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) setup.py -q build_ext
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m pip install --no-build-isolation -e '.[test,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info fused_resnet/*.so
