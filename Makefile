# make demo | test | lint | docs | soak | bench: each installs what it needs, again only after setup.cfg changes.
# `bench` has an environment of its own: with the peers' Django beside them, tests fail.

CANDIDATES := $(foreach minor,13 12 11 10,\
	python3.$(minor) $(wildcard $(HOME)/.pyenv/versions/3.$(minor).*/bin/python)) python3
PYTHONS := $(shell for each in $(CANDIDATES); do \
	$$each -c 'import sys; assert sys.version_info >= (3, 10)' 2>/dev/null && echo $$each; done)
NEWEST := $(firstword $(PYTHONS))
OLDEST := $(lastword $(NEWEST) $(filter-out python3,$(PYTHONS)))
SQLALCHEMY_2_0 = 'sqlalchemy<2.1'

.PHONY: demo test lint docs soak bench clean

demo: .venv/demo
	.venv/bin/python -m example_project.demo

# The last run repeats the core on the oldest Python of this machine, with SQLAlchemy 2.0.
test: lint docs .venv/test .venv-oldest/test
	.venv/bin/python -m pytest $(PARALLEL)
	.venv-oldest/bin/python -m pytest $(PARALLEL) $(CORE)

# Six processes on any machine, since most tests wait for other processes. With `worksteal` each
# test process runs a stretch of neighbouring tests, which share fixtures, then helps the others.
PARALLEL = -q -n 6 --dist worksteal

CORE = tests/core/test_settings.py tests/core/test_message.py tests/core/test_inspection.py \
	tests/outbox/test_transaction.py tests/outbox/test_join.py tests/outbox/test_attach.py \
	tests/inbox/test_delivery.py tests/inbox/test_handler_transactions.py \
	tests/inbox/test_named_tasks.py tests/inbox/test_ordering.py \
	tests/requests/test_responder.py tests/requests/test_client.py tests/faults/test_whole_road.py

lint: .venv/test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

docs: .venv-docs/docs
	.venv-docs/bin/python -m sphinx --quiet --fail-on-warning --builder html docs build/docs

soak: .venv/test
	.venv/bin/python -m pytest -q -m soak --timeout 3600

# SCALE multiplies the number of messages and rows: S7 reaches the sizes of its goal with 10.
SCALE = 1
bench: export PYTHONHASHSEED = 0
bench: .venv-bench/bench
	.venv-bench/bin/python -m benchmarks all --scale $(SCALE)

clean:
	rm -rf .venv .venv-bench .venv-docs .venv-oldest build dist *.egg-info

.venv/demo: setup.cfg .venv/bin/python
	.venv/bin/python -m pip install --quiet --editable .
	touch $@

.venv/test: setup.cfg .venv/bin/python
	.venv/bin/python -m pip install --quiet --editable '.[test,lint]'
	touch $@

.venv-bench/bench: setup.cfg .venv-bench/bin/python
	.venv-bench/bin/python -m pip install --quiet --editable '.[bench]'
	touch $@

.venv-docs/docs: setup.cfg .venv-docs/bin/python
	.venv-docs/bin/python -m pip install --quiet --editable '.[docs]'
	touch $@

.venv-oldest/test: setup.cfg .venv-oldest/bin/python
	.venv-oldest/bin/python -m pip install --quiet --editable '.[test]' $(SQLALCHEMY_2_0)
	touch $@

.venv/bin/python:
	$(call make_venv,$(NEWEST),.venv)

.venv-bench/bin/python:
	$(call make_venv,$(NEWEST),.venv-bench)

.venv-docs/bin/python:
	$(call make_venv,$(NEWEST),.venv-docs)

.venv-oldest/bin/python:
	$(call make_venv,$(OLDEST),.venv-oldest)

# Debian's python3 has no ensurepip, which venv needs; virtualenv does without.
define make_venv
	@test -n "$(1)" || { echo "Python 3.10 or newer is needed: install python3 and python3-venv."; exit 1; }
	$(1) -c 'import ensurepip' 2>/dev/null && $(1) -m venv $(2) \
	|| $(1) -m virtualenv --quiet $(2) || virtualenv --quiet --python $(1) $(2) \
	|| { echo "$(1) cannot make a virtual environment: install python3-venv (apt) or virtualenv (pip)."; exit 1; }
endef
