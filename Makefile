# make demo, make test: all that is needed is Python >= 3.11 with venv, a C++ compiler and make.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
DEVELOPED := .venv/.developed
INPUTS := pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/sparsessm/kernels/*.cpp src/sparsessm/kernels/*.h)

.PHONY: demo test test-portable lint bench wheel wheel-test docs clean

demo: $(INSTALLED) ## prune the built-in model by every method, pack it, run it
	$(BIN)/sparsessm demo

COVERAGE := # of src, if asked for; then less than pyproject.toml wants fails

test: $(DEVELOPED) ## the whole suite, two workers
	$(BIN)/python -m pytest -n 2 --dist worksteal $(COVERAGE)

# Tests whose outcome could hang on one processor: on the code of older ones, of ours and of the BLAS alike, and
# with other numbers of threads.
NUMERIC := $(addprefix tests/,$(addsuffix .py,$(addprefix methods/test_,balanced degenerate dense_target grids \
	hessian on_grid readouts refit removed_before repair structured_methods transcription_grids \
	transcription_linear transcription_sweep) \
	$(addprefix runtime/test_,engine engine_mamba2 engine_projected engine_widths reference) \
	$(addprefix architectures/test_,compute family projected) $(addprefix pruning/test_,projection entries) \
	calibration/test_prices kernels/test_products))
NUMERIC_METHODS := $(filter tests/methods/%,$(NUMERIC))
OLDEST := MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41 ATEN_CPU_CAPABILITY=default SPARSESSM_KERNELS=portable
OLDER := MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 SPARSESSM_KERNELS=avx2
HAS_AVX2 := "import sys; from sparsessm.kernels import LEVELS; sys.exit('avx2' not in LEVELS)"

test-portable: $(DEVELOPED) ## the numerically sensitive part, as on other processors
	$(OLDEST) $(BIN)/python -m pytest -n 2 --dist worksteal $(NUMERIC)
	if $(BIN)/python -c $(HAS_AVX2); then \
		OMP_NUM_THREADS=2 SPARSESSM_TEST_THREADS=2 $(OLDER) $(BIN)/python -m pytest $(NUMERIC_METHODS); fi

lint: $(DEVELOPED) ## style, types, and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python tools/rooms.py

bench: $(INSTALLED) ## the kernels, the calibration, its precision and the runtime, in time and memory
	$(BIN)/python bench/bench.py
	$(BIN)/python bench/compute.py
	$(BIN)/python bench/runtime.py

PYTHONS ?= $(PYTHON) # a wheel by each: `make wheel PYTHONS="python3.11 python3.12"`

wheel: $(DEVELOPED) ## an sdist and wheels in dist/, for any Linux with glibc 2.17 and later
	$(INSTALL) -e ".[release]"
	$(BIN)/python tools/wheels.py $(PYTHONS)

wheel-test: ## dist/ installed and used by each of PYTHONS where there is no compiler
	$(PYTHON) tools/try_wheels.py $(PYTHONS)

docs: $(DEVELOPED) ## the pages as a site, in site/: a warning, a dead link or a request to the outside fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	! grep -rElI '<(link|script|img|iframe)[^>]*(href|src)="?(https?:)?//' site --include='*.html'

clean: ## what building and testing left, .venv excepted
	rm -rf build dist site .coverage* .hypothesis .pytest_cache .ruff_cache demo-out demo-out.*
	find src tests tools bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# Installed anew when the declaration, the pins or a kernel changed; Python files are read where they lie.
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
VENV = $(BIN)/python -c "" 2>/dev/null || $(PYTHON) -m venv .venv

$(INSTALLED): $(INPUTS)
	$(VENV)
	$(INSTALL) -e .
	touch $@

$(DEVELOPED): $(INPUTS) # with what tests and linters need
	$(VENV)
	$(INSTALL) -e ".[dev]"
	touch $(INSTALLED) $@
