# Needs make and CPython 3.11 or newer, and nothing else: every target makes the environment that it runs in.
#
#   PYTHON=python3.13   the interpreter (default: the first that is new enough)
#   ARGS="-k routing"   more arguments for pytest

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-all soak coverage lint format bench clean

VENV := .venv
BENCH := .venv-bench
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check
# Tests wait for processes more than they compute; more than a few workers only crowd each other. A file stays
# with one worker, which makes the file's servers and environments once (pytest 9.2 ignores xdist_group).
PYTEST := $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do \
		printf '  make %-10s %s\n' "$$name" "$$text"; done

demo: $(VENV)/.installed  ## Two example apps behind http://127.0.0.1:5000, broker included; Ctrl-C ends it
	$(BIN)/flaskbus dev --chdir examples shop:app=/shop blog:app=/blog

test: $(VENV)/.test  ## Every test that takes seconds
	$(PYTEST) -m "not slow" $(ARGS)

test-all: test $(VENV)/.deploy  ## The same, then the long ones: faults, deployment files, clean installs
	$(PYTEST) -m slow $(ARGS)

soak: $(VENV)/.test  ## Load and faults for as long as you like, and a table: ARGS="--seconds 600"
	$(BIN)/python -m tests.faults.soak $(ARGS)

coverage: $(VENV)/.test  ## The pure modules are tested at every branch
	$(PYTEST) tests/unit --cov --cov-report=term

lint: $(VENV)/.test  ## ruff, mypy --strict, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.test  ## Let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(BENCH)/.installed  ## flaskbus beside nginx, gunicorn, granian and uWSGI; ARGS="--quick" for a look
	$(BENCH)/bin/python -m benchmarks $(ARGS)

clean:  ## Remove the environment and everything that was built
	rm -rf $(VENV) $(BENCH) build dist htmlcov .coverage .coverage.* .*_cache .hypothesis examples/instance
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment. A stamp is newer than pyproject.toml or everything is made again, and so it is when another
# PYTHON is asked for: a test run must not pass on an interpreter that was not meant.

ifneq ($(PYTHON),$(shell cat $(VENV)/.python 2>/dev/null))
.PHONY: $(VENV)/.installed
endif

$(VENV)/.installed: pyproject.toml .ci/venv
	.ci/venv $(VENV)
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.installed
	$(INSTALL) --group test --group lint
	@touch $@

$(VENV)/.deploy: $(VENV)/.test
	$(INSTALL) --group deploy --group protocols
	@touch $@

# Its own: what the other servers need does not always go with what the tests need.
$(BENCH)/.installed: pyproject.toml .ci/venv
	.ci/venv $(BENCH)
	$(BENCH)/bin/python -m pip install -qq --disable-pip-version-check --editable . --group bench
	@# Needs a C compiler; without it, uWSGI is skipped.
	-$(BENCH)/bin/python -m pip install -qq --disable-pip-version-check --group bench-uwsgi
	@touch $@
