# The two commands: `make demo` and `make test`. Both set up .venv from constraints.txt when it is missing or out of date.
VENV := .venv
PY := $(VENV)/bin/python
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-slurm lint install clean-demo

# both trainings at once, a thread each: small products gain little or nothing from a second one
demo: install
	$(PY) run.py experiment=demo stage=initialize
	@echo "both recipes at once: two to four minutes where they are not trained yet"
	$(PY) run.py -m experiment=demo,demo_posterior threads=1 hydra/launcher=submitit_local
	$(PY) run.py stage=report "runs=[runs/demo,runs/demo_posterior]"

test: install
	$(PY) -m pytest

# the tests against a real SLURM, which they start on 127.0.0.1; as root the Debian packages for it are installed where they are missing
SLURM_PACKAGES := slurmctld slurmd munge slurm-client slurmdbd mariadb-server-core
test-slurm: install
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! { command -v sbatch && [ -x /usr/sbin/slurmd ] && [ -x /usr/sbin/slurmctld ] \
	  && [ -x /usr/sbin/slurmdbd ] && [ -x /usr/sbin/munged ] && [ -x /usr/sbin/mariadbd ]; } >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SLURM_PACKAGES); fi
	CGTGAN_SLURM=1 $(PY) -m pytest -n0 tests/slurm

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
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[clip,slurm,serve,optuna,dev]'
	touch $@

# removes what the demo made: `make demo` starts from nothing again
clean-demo:
	rm -rf runs/demo runs/demo_posterior runs/comparison runs/multirun artifacts
