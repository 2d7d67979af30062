# This needs CPython >= 3.10, make and gcc; the first run also needs a package index. Each target sets up .venv from the
# project's files and leaves a stamp there, so that a second run starts at once. `make PYTHON=python3.12 test` uses
# another interpreter (run `make clean` first).

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
# The install is editable: a changed .py file needs no reinstall, but a changed source of an extension does.
CYTHON := $(wildcard hashemb/*.pyx hashemb/ctr/*.pyx hashemb/ctr/data/*.pyx)
C_FILES := $(wildcard hashemb/csrc/* hashemb/ctr/csrc/* hashemb/ctr/data/csrc/*)
SOURCES := pyproject.toml setup.py $(CYTHON) $(C_FILES) $(wildcard hashemb/*.pxd)

.PHONY: demo test lint docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/.stamp-ctr
	$(VENV)/bin/hashemb demo

test: $(VENV)/.stamp-test
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.stamp-lint
	$(VENV)/bin/ruff check
	$(VENV)/bin/clang-format --dry-run --Werror $(C_FILES)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cython-lint $(CYTHON) $(wildcard hashemb/*.pxd)
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m mypy.stubtest --mypy-config-file pyproject.toml \
		--allowlist .ci/stubtest-allowlist --ignore-unused-allowlist $(subst /,.,$(basename $(CYTHON)))

# The pages of the Python interface are generated anew, so that none is left of a name that is gone.
docs: $(VENV)/.stamp-docs
	rm -rf docs/reference/generated build/docs
	$(VENV)/bin/python -m sphinx -W --keep-going -q -j 2 -d build/doctrees docs build/docs
	@echo "the site is build/docs/index.html"

clean:
	rm -rf $(VENV) build dist docs/reference/generated *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(CYTHON:.pyx=.c) hashemb/*.so hashemb/ctr/*.so hashemb/ctr/data/*.so
	find hashemb tests bench examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "hashemb needs CPython >= 3.10, found " + sys.version)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp-%: $(SOURCES) | $(VENV)/bin/python
	$(PIP) --editable '.[$*]'
	@touch $@
