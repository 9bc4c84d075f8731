# make demo   learn, evaluate, save and use activation scalars on a small real model
# make test   the whole test suite
# make check  ruff and mypy
# make bench  the benchmark harness, into benchmarks/results
PYTHON ?= python3
VENV   ?= .venv
# One PyTorch for every machine; TORCH="torch==2.13.0 --index-url …" or TORCH=torch takes another build.
TORCH  ?= torch==2.13.0
MODEL  ?=
# Test processes; each uses PyTorch's threads, which sleep when they wait so as not to hold up the others.
WORKERS ?= 2
RUN    := $(VENV)/bin

.PHONY: demo test check bench clean

demo: $(VENV)/installed
	$(RUN)/actscale-fast demo $(if $(MODEL),--model $(MODEL))

test: $(VENV)/tested
	OMP_WAIT_POLICY=PASSIVE $(RUN)/pytest -n $(WORKERS) --dist loadfile

check: $(VENV)/tested
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

bench: $(VENV)/tested
	$(RUN)/python -m benchmarks

$(VENV)/torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --upgrade pip
	$(RUN)/python -m pip install --quiet $(TORCH)
	touch $@

# Installed as any user would: in build isolation, not editable. Sources newer than the stamp are installed again.
SOURCES := pyproject.toml setup.py tests/unpinned.txt $(shell find csrc actscale_fast -name '*.py' -o -name '*.cpp' -o -name '*.cu' -o -name '*.h')

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(RUN)/python -m pip install --quiet .
	touch $@

$(VENV)/tested: $(VENV)/torch $(SOURCES)
	$(RUN)/python -m pip install --quiet '.[test]'
	$(RUN)/python -m pip install --quiet --no-deps -r tests/unpinned.txt
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) build dist *.egg-info
