VENV   ?= .venv
PYTHON ?= python3
PRESET ?= quick
JOBS   ?=
RUN     = $(VENV)/bin/python -m
# Files in the order of tests/conftest.py; a test that kills its process is not given to a new one, for ever.
TEST    = $(RUN) pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0
NUMERIC = $(addprefix tests/test_,$(addsuffix .py,strides every_recipe training arrays folded crossbar value_sets quantization \
          faults spent export kernels attention dynamic spiking))

# Torch's kernels go by two names of its own, compiled ones of ours by the processor that numba compiles for.
OURS    = $(if $(filter x86_64,$(shell uname -m)),NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=+avx2$(COMMA)+fma$(COMMA)+bmi2)
COMMA  := ,

.PHONY: reports test test-avx2 lab benchmarks clean

reports: $(VENV)/ready  ## run every study at PRESET in JOBS processes (else as many as fit), and render reports/PRESET/index.html
	$(RUN) lib.reproduce --preset $(PRESET) $(if $(JOBS),--jobs $(JOBS))

test: $(VENV)/ready  ## lint, unit tests, every notebook at the smoke preset, one report from end to end
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(TEST)
	rm -rf build/smoke-cache
	$(RUN) lib.reproduce --preset smoke --prepare-only build/nbval
	CACHE_ROOT="$(CURDIR)/build/smoke-cache" $(TEST) --nbval-lax --nbval-current-env --nbval-cell-timeout 600 build/nbval

test-avx2: $(VENV)/ready  ## the numeric tests again, under the instructions that most machines share
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(OURS) $(TEST) $(NUMERIC)

lab: $(VENV)/ready  ## open the notebooks in JupyterLab
	$(RUN) jupyterlab --notebook-dir=notebooks

benchmarks: $(VENV)/ready  ## print the speed tables
	for f in tests/benchmarks/*.py; do $(VENV)/bin/python $$f; done

$(VENV)/ready: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:  ## remove what runs leave behind, committed reports excepted
	rm -rf build .cache reports/quick reports/smoke .pytest_cache .ruff_cache
