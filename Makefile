# Two commands: `make demo` (the main job, end to end, on real data) and `make test`. Each sets up .venv by itself.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := 1
# uv is faster where it is present; pip does the same.
INSTALL = $(if $(shell command -v uv),uv pip install --quiet --python $(BIN)/python,$(BIN)/python -m pip install --quiet --disable-pip-version-check)

.PHONY: demo test check-source notebooks pytest docs bench build browser schedulers clean help

help:
	@echo "make demo   the founding example, end to end"; echo "make test   everything that CI runs"; echo "make docs   the site, into _docs/"; echo "make bench  the figures, against their peers"

# Two makes that start together take turns (where there is a flock); setup.py builds the JupyterLab panel when its sources changed; the stamp makes a second call free.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(shell git ls-files lab 2>/dev/null | tr '\n' ' ')
	@exec 9>.install.lock; ! command -v flock >/dev/null || flock 9; \
	if [ ! -e $@ ] || [ -n "$$(find $^ -newer $@)" ]; then \
	  [ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV) || exit 2; \
	  echo "installing into $(VENV) … (a minute or two, once)"; \
	  $(INSTALL) -c constraints.txt -e '.[dev]' || exit 2; \
	  touch $@; \
	fi

demo: $(VENV)/.installed
	@mlops --project . run examples/recommender

test: $(VENV)/.installed check-source notebooks browser schedulers pytest

check-source: $(VENV)/.installed
	nbdev-export
	nbdev-clean
	$(BIN)/python tools/readme.py --check
	@git diff --exit-code -- nbs mlops_nb README.md || { echo "the notebooks and the modules differ: run nbdev-export and nbdev-clean, then commit both"; exit 1; }

notebooks: $(VENV)/.installed
	MLOPS_PROGRESS=0 nbdev-test --n-workers 2

browser:
	@$(BIN)/python tests/browser.py --install

schedulers:  # the tools that read our exported schedules; without them their tests are skipped
	-@$(BIN)/python tests/test_exports.py --install

pytest: $(VENV)/.installed
	MLOPS_PROGRESS=0 pytest -n 2 --dist loadfile

docs: $(VENV)/.installed
	$(BIN)/python tools/docs.py

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks

build: $(VENV)/.installed
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist _docs _proc *.egg-info mlops_nb/labextension lab/node_modules lab/lib
