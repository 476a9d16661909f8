# bitflow_edu: `make` alone lists the targets.
# Everything runs in the active virtual environment, or in .venv, which is made when there is none.

PYTHON ?= python3
ACTIVE := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX))
ENV    := $(or $(ACTIVE),$(CURDIR)/.venv)
BIN    := $(ENV)/bin
# folders may have spaces in their names: recipes quote them, targets escape them
SPACE  := $(subst ,, )
TARGET := $(subst $(SPACE),\ ,$(ENV))
STAMP  := $(TARGET)/.bitflow_edu-installed
NB     ?= $(shell find nbs -name '*.ipynb' -not -path '*/.ipynb_checkpoints/*' | sort)
RUFFED := nbs tests data docs setup.py

# test-matrix: one environment for each Python; on the oldest, the oldest torch of settings.ini
PYTHONS ?= 3.10 3.11 3.12 3.13
STEPS   ?= test
MATRIX  := build/matrix
OLDEST  := 3.10
OLDEST_TORCH := torch==2.6.0 torchvision==0.21.0

export PATH := $(BIN):$(PATH)

# docs: packages in a stamp of their own, MathJax from npm; both once
DOCS_STAMP := $(TARGET)/.bitflow_edu-docs-installed
MATHJAX := mathjax@3.2.2

# slides: Marp from npm, once
MARP := @marp-team/marp-cli@4.5.1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu test-matrix test-alone lint format lab notebooks readme export weights playground slides \
  docs
.PHONY: test-generated test-code test-notebooks test-malformed dist

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

$(TARGET)/bin/python:
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and f"bitflow_edu needs Python 3.10 or newer; $(PYTHON) is {v[0]}.{v[1]}. Name another with: make PYTHON=python3.12 ...")'
	@echo "No active environment: making .venv with $(PYTHON)"
	"$(PYTHON)" -m venv "$(ENV)"

$(STAMP): $(TARGET)/bin/python settings.ini setup.py
	@echo "Installing bitflow_edu and what it needs into $(ENV) (PyTorch is large: this takes some minutes, once)"
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check -e ".[notebooks,dev]"
	@touch "$@"

setup: $(STAMP)  ## make or use an environment and install everything

demo: $(STAMP)  ## train F and G on real digits (about 5 minutes on 2 cores), write runs/demo/report.html
	@echo "Training on the embedded digits; report, figures and models go to runs/demo"
	"$(BIN)/bitflow" demo --resume

test: $(STAMP)  ## everything that CI runs: style, generated files, pytest, every notebook
	@echo "1/5 style: ruff check and ruff format; make format mends most of it"
	@$(MAKE) --no-print-directory lint
	@echo "2/5 generated files: nbdev_clean, finish_notebooks.py, nbdev_export and the README must leave nothing changed"
	@$(MAKE) --no-print-directory test-generated
	@echo "3/5 tests"
	@$(MAKE) --no-print-directory test-code
	@echo "4/5 notebooks; small models that come with the course are trained anew, for a few steps"
	@$(MAKE) --no-print-directory test-notebooks
	@echo "5/5 malformed input, at random, for 100 seconds"
	@$(MAKE) --no-print-directory test-malformed

test-generated: $(STAMP)
	@"$(BIN)/python" tests/check_generated.py

test-code: $(STAMP)
	OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest -q -n 2 --dist loadfile tests

test-notebooks: $(STAMP)
	RETRAIN=1 OMP_NUM_THREADS=1 "$(BIN)/nbdev_test" --n_workers 2 --timing

test-malformed: $(STAMP)
	"$(BIN)/python" tests/fuzz.py

test-gpu: $(STAMP)  ## what only a GPU shows: training, captured decoding, evaluation, resume
	@"$(BIN)/python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "torch finds no GPU here: make test runs the same tests on the CPU")'
	"$(BIN)/python" -m pytest -q -rs tests/test_cuda.py tests/test_compiled.py

test-matrix:  ## make test on every Python found, each in build/matrix (PYTHONS="3.10 3.13": only those; STEPS=test-code: only that)
	@mkdir -p $(MATRIX) && printf '%s\n' $(OLDEST_TORCH) > $(MATRIX)/oldest.txt
	@ran=; for v in $(PYTHONS); do \
	  found=; for p in python$$v "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$$v.*/bin/python; do \
	    if "$$p" -c '' 2> /dev/null; then found=$$p; break; fi; done; \
	  if [ -z "$$found" ]; then echo "Python $$v was not found: skipped"; continue; fi; \
	  pins=; if [ $$v = $(OLDEST) ]; then pins=$(MATRIX)/oldest.txt; fi; \
	  echo "Python $$v$${pins:+ with $(OLDEST_TORCH)}"; \
	  [ -x $(MATRIX)/$$v/bin/python ] || "$$found" -m venv $(MATRIX)/$$v || exit 1; \
	  PIP_CONSTRAINT=$$pins $(MAKE) --no-print-directory $(STEPS) VIRTUAL_ENV="$(CURDIR)/$(MATRIX)/$$v" || exit 1; \
	  ran="$$ran $$v"; done; \
	if [ -z "$$ran" ]; then echo "none of these Pythons was found: $(PYTHONS)"; exit 1; fi; \
	echo "passed on Python$$ran"

test-alone: $(STAMP)  ## run each lesson alone: the installed wheel, an empty folder, no network (NB=...: only that)
	"$(BIN)/python" tests/alone.py $(if $(filter command line environment,$(origin NB)),$(NB))

lint: $(STAMP)  ## the style of notebooks, tests and scripts; changes nothing
	@"$(BIN)/ruff" check $(RUFFED)
	@"$(BIN)/ruff" format --check $(RUFFED)

format: $(STAMP)  ## ruff: format notebooks, tests and scripts, and mend what it can
	"$(BIN)/ruff" check --fix --exit-zero $(RUFFED)
	"$(BIN)/ruff" format $(RUFFED)

lab: $(STAMP)  ## start JupyterLab on the notebooks
	"$(BIN)/jupyter" lab --notebook-dir nbs

notebooks: $(STAMP)  ## execute every notebook at reading scale and store its outputs (NB=nbs/07*.ipynb: only that)
	@for nb in $(NB); do echo "executing $$nb"; \
	  "$(BIN)/jupyter" nbconvert --log-level ERROR --to notebook --execute --inplace "$$nb" || exit 1; done
	"$(BIN)/nbdev_clean"
	"$(BIN)/python" nbs/finish_notebooks.py
	"$(BIN)/python" nbs/make_readme.py

export: $(STAMP)  ## write bitflow_edu/ and README.md from the notebooks
	"$(BIN)/nbdev_clean"
	"$(BIN)/python" nbs/finish_notebooks.py
	"$(BIN)/nbdev_export"
	"$(BIN)/python" nbs/make_readme.py

readme: $(STAMP)  ## write README.md from nbs/index.ipynb
	"$(BIN)/python" nbs/make_readme.py

weights: $(STAMP)  ## copy the models of runs/demo into data/mnist-mini, where the lessons load them
	"$(BIN)/python" data/make_weights.py runs/demo --to mnist-mini --results results/demo-mnist-mini.json

dist: $(TARGET)/bin/python  ## build the source distribution and the wheel into dist/
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check build
	"$(BIN)/python" -m build

playground: $(STAMP)  ## build build/playground.html: draw, edit and race F and G in a browser
	"$(BIN)/python" docs/playground/build.py

build/marp:
	mkdir -p $@.part
	PUPPETEER_SKIP_DOWNLOAD=1 npm install --silent --no-audit --no-fund --prefix $@.part $(MARP)
	mv $@.part $@

slides: $(STAMP) build/marp  ## a deck for each lesson, HTML and PDF, in build/decks; needs npm, chromium
	"$(BIN)/python" docs/slides/build.py $(LESSONS)

$(DOCS_STAMP): $(STAMP)
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	@touch "$@"

build/mathjax:
	@if mkdir -p $@.part && cd $@.part && npm pack --silent $(MATHJAX) > npm.log && tar -xzf mathjax-*.tgz; \
	then cd .. && mv mathjax.part mathjax; \
	else echo "npm did not bring $(MATHJAX): a script from cdn.jsdelivr.net will draw the site's formulas"; fi

docs: $(DOCS_STAMP) build/mathjax playground  ## build the site into build/docs; needs npm, for MathJax
	"$(BIN)/python" docs/stage.py
	"$(BIN)/python" -m sphinx -q -W --keep-going -j 2 -c docs -d build/docs-doctrees build/docs-source build/docs
	"$(BIN)/python" docs/check_links.py build/docs
