# Each target is enough by itself on a fresh clone: it creates .venv, installs and builds what it needs.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Two at a time, by files in tests/conftest.py's order; threads that wait must sleep then, or they take the cores from those that work.
PYTEST := OMP_WAIT_POLICY=passive $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
INSTALL := $(RUN) -m pip install --quiet --constraint constraints.txt
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
# Without kernels there is no stamp: the next make tries to build them again.
STAMP = @if $(RUN) -c "import dsfast._native" 2> /dev/null; then touch $@; else \
	echo "The kernels could not be built: everything runs in plain PyTorch, slower. To see why: $(RUN) -m pip install -v -e ."; fi

.PHONY: suite test test-all lint format build bench clean

suite: $(VENV)/installed
	$(RUN) -m dsfast.suite $(ARGS)

test: $(VENV)/installed-test
	$(PYTEST) $(ARGS)

test-all: $(VENV)/installed-test
	$(PYTEST) -m "not gpu" $(ARGS)

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h

format: $(VENV)/installed-dev
	$(VENV)/bin/ruff check --fix . && $(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i csrc/*.cpp csrc/*.h

bench: $(VENV)/installed-bench
	$(RUN) -m dsfast.bench step $(ARGS)

build: $(VENV)/installed
	@test -e $(VENV)/installed

clean:
	rm -rf build dsfast/_native*.so $(VENV)/installed*

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# pip builds the extension; the stamps are older than any changed source, so a changed kernel is built before it runs.
$(VENV)/installed: $(VENV)/bin/python $(SOURCES)
	@echo "Installing dsfast into $(VENV) and building its kernels (a minute or two; torch is the largest part) ..."
	$(INSTALL) -e .
	$(STAMP)

$(VENV)/installed-%: $(VENV)/bin/python $(SOURCES)
	@echo "Installing dsfast[$*] into $(VENV) and building its kernels (a minute or two; torch is the largest part) ..."
	$(INSTALL) -e ".[$*]"
	$(STAMP)
