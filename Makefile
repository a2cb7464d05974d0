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
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: python3 is older than 3.10: install a newer one"; exit 1; }
	$(PY) -m pip --version >/dev/null 2>&1 || python3 -m venv --clear $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check "setuptools<82" wheel
	$(PY) -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[clip,slurm,serve,dev]'
	touch $@

# removes what the demo made: `make demo` starts from nothing again
clean-demo:
	rm -rf runs/demo artifacts
