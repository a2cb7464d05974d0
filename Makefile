# The two commands: `make demo` and `make test`. Both set up .venv from constraints.txt when it is missing or out of date.
VENV := .venv
PY := $(VENV)/bin/python
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint install clean-demo

demo: install
	$(PY) run.py experiment=demo

test: install
	$(PY) -m pytest

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

install: $(VENV)/installed

# torch first and by its exact number: a range would fetch several GB of CUDA libraries on a machine without a GPU
$(VENV)/installed: pyproject.toml constraints.txt
	@echo "setting up $(VENV) (a minute or two) ..."
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check "setuptools<82" wheel
	$(PY) -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[clip,slurm,dev]'
	touch $@

# removes what the demo made: `make demo` starts from nothing again
clean-demo:
	rm -rf runs/demo artifacts
