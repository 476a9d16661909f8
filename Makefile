# bitflow_edu: `make` alone lists the targets.
# Everything runs in the active virtual environment, or in .venv, which is made when there is none.

PYTHON ?= python3
ACTIVE := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX))
ENV    := $(or $(ACTIVE),$(CURDIR)/.venv)
BIN    := $(ENV)/bin
STAMP  := $(ENV)/.bitflow_edu-installed
NB     ?= nbs/*.ipynb nbs/solutions/*.ipynb

export PATH := $(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup demo test lab notebooks readme export weights

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 22

$(ENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and f"bitflow_edu needs Python 3.10 or newer; $(PYTHON) is {v[0]}.{v[1]}. Name another with: make PYTHON=python3.12 ...")'
	@echo "No active environment: making .venv with $(PYTHON)"
	$(PYTHON) -m venv $(ENV)

$(STAMP): $(ENV)/bin/python settings.ini setup.py
	@echo "Installing bitflow_edu and what it needs into $(ENV) (PyTorch is large: this takes some minutes, once)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[notebooks,dev]"
	@touch $@

setup: $(STAMP)  ## make or use an environment and install everything

demo: $(STAMP)  ## train F and G on real digits (about 5 minutes on 2 cores), write runs/demo/report.html
	@echo "Training on the embedded digits; the figures go to results/, the report to runs/demo/report.html"
	$(BIN)/bitflow demo --resume

test: $(STAMP)  ## everything that CI runs: generated files, pytest, every notebook
	@echo "1/3 generated files: nbdev_clean, nbdev_export and the README must leave nothing changed"
	@$(BIN)/python tests/check_generated.py
	@echo "2/3 tests"
	$(BIN)/python -m pytest -q tests
	@echo "3/3 notebooks; small models that come with the course are trained anew, for a few steps"
	RETRAIN=1 OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing

lab: $(STAMP)  ## start JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir nbs

notebooks: $(STAMP)  ## execute every chapter at reading scale and store its outputs (NB=nbs/07*.ipynb: only that)
	@for nb in $(NB); do echo "executing $$nb"; \
	  $(BIN)/jupyter nbconvert --log-level ERROR --to notebook --execute --inplace $$nb || exit 1; done
	$(BIN)/nbdev_clean
	$(BIN)/python nbs/make_readme.py

export: $(STAMP)  ## write bitflow_edu/ and README.md from the notebooks
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/python nbs/make_readme.py

readme: $(STAMP)  ## write README.md from nbs/index.ipynb
	$(BIN)/python nbs/make_readme.py

weights: $(STAMP)  ## copy the models of runs/demo into data/mnist-mini, where the chapters load them
	$(BIN)/python data/make_weights.py runs/demo --to mnist-mini --results results/demo-mnist-mini.json
