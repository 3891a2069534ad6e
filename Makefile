# make demo | test | lint | soak | bench: each sets itself up in .venv, and again only when setup.cfg changes.

CANDIDATES := $(foreach minor,13 12 11 10,\
	python3.$(minor) $(wildcard $(HOME)/.pyenv/versions/3.$(minor).*/bin/python)) python3
PYTHONS := $(shell for each in $(CANDIDATES); do \
	$$each -c 'import sys; assert sys.version_info >= (3, 10)' 2>/dev/null && echo $$each; done)
NEWEST := $(firstword $(PYTHONS))
OLDEST := $(lastword $(NEWEST) $(filter-out python3,$(PYTHONS)))
SQLALCHEMY_2_0 = 'sqlalchemy<2.1'

.PHONY: demo test lint soak bench clean

demo: .venv/demo
	.venv/bin/python -m example_project.demo

# The last run repeats the core on the oldest Python of this machine, with SQLAlchemy 2.0.
test: lint .venv/test .venv-oldest/test
	.venv/bin/python -m pytest $(PARALLEL)
	.venv-oldest/bin/python -m pytest $(PARALLEL) $(wildcard $(CORE))

# Most tests wait for processes. The hash seed: pytest-celery keeps its parameters in sets, and the
# test processes have to agree on their order.
# Each process takes a stretch of the tests, with its fixtures, and then from what others have left.
PARALLEL = -q -n 4 --dist worksteal
test soak: export PYTHONHASHSEED = 0

CORE = $(addprefix tests/unit/test_,$(addsuffix .py,joining attachment delivery order transaction \
	settings message inspection replying requesting)) tests/road/test_whole_road.py

lint: .venv/test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

soak: .venv/test
	.venv/bin/python -m pytest -q -m soak --timeout 3600

# SCALE multiplies the number of messages and rows: S7 reaches the sizes of its goal with 10.
SCALE = 1
bench: export PYTHONHASHSEED = 0
bench: .venv/bench
	.venv/bin/python -m benchmarks all --scale $(SCALE)

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info

.venv/demo: setup.cfg .venv/bin/python
	.venv/bin/python -m pip install --quiet --editable .
	touch $@

.venv/test: setup.cfg .venv/bin/python
	.venv/bin/python -m pip install --quiet --editable '.[test,lint]'
	touch $@

.venv/bench: setup.cfg .venv/bin/python
	.venv/bin/python -m pip install --quiet --editable '.[bench]'
	touch $@

.venv-oldest/test: setup.cfg .venv-oldest/bin/python
	.venv-oldest/bin/python -m pip install --quiet --editable '.[test]' $(SQLALCHEMY_2_0)
	touch $@

.venv/bin/python:
	$(call make_venv,$(NEWEST),.venv)

.venv-oldest/bin/python:
	$(call make_venv,$(OLDEST),.venv-oldest)

# Debian's python3 comes without ensurepip, which venv needs.
define make_venv
	@test -n "$(1)" || { echo "Python 3.10 or newer is needed: install python3 and python3-venv."; exit 1; }
	$(1) -c 'import ensurepip' 2>/dev/null && $(1) -m venv $(2) \
	|| $(1) -m virtualenv --quiet $(2) || virtualenv --quiet --python $(1) $(2) \
	|| { echo "$(1) cannot make a virtual environment: install python3-venv (apt) or virtualenv (pip)."; exit 1; }
endef
