# Every entry point. `make` alone prints this list.
#
#   make run-notebook RECIPE=baseline SEED=1      settings follow as NAME=value

PYTHON ?= python3
VENV ?= .venv
PY := "$(VENV)/bin/python"

# What runs may be told. RUN is a run directory, by default runs/<recipe>-<protocol>-seed<seed>.
NB ?= stats training analysis
RECIPE ?= quick
PROTOCOL ?= val
DATASET ?= auto
SEED ?= 0
DEVICE ?= auto
FORCE ?= 0
RUN ?=
PARAMS ?=
IMAGE ?=
RECIPES ?= $(RECIPE)
SEEDS ?= 0 1 2
STUDY ?=
JOBS ?=
FOLDER ?=
BENCH ?=

# albumentations otherwise asks the package index for news at every import.
export NO_ALBUMENTATIONS_UPDATE := 1
# How long a waiting OpenMP thread spins before it sleeps. By default so long that a machine with
# anything else to do trains ten times slower; much shorter, and a quiet one loses a third.
export GOMP_SPINCOUNT ?= 30000

SETTINGS = --recipe "$(RECIPE)" --protocol "$(PROTOCOL)" --dataset "$(DATASET)" --seed "$(SEED)" \
	--device "$(DEVICE)" --force "$(FORCE)" --run "$(RUN)" $(PARAMS)

.DEFAULT_GOAL := help
.PHONY: help env run-notebook stats train analysis tour lab predict sweep bench results verify-results test test-fast lint clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  Settings, e.g. make run-notebook RECIPE=baseline SEED=1 DATASET=cifar10"
	@echo "    NB        which notebooks: stats training analysis      (all three)"
	@echo "    RECIPE    quick, tuned, sprint or baseline              (quick)"
	@echo "    PROTOCOL  val, full or test-selected                    (val)"
	@echo "    DATASET   auto, cifar10 or shapes, the stand-in         (auto)"
	@echo "    SEED      any whole number                              (0)"
	@echo "    DEVICE    auto, cpu, cuda or mps                        (auto)"
	@echo "    RUN       the run directory                             (runs/RECIPE-PROTOCOL-seedSEED)"
	@echo "    FORCE     1 trains anew what is finished                (0)"
	@echo '    PARAMS    more parameters of the notebooks, e.g. PARAMS="-p epochs 5"'
	@echo "  make sweep instead takes RECIPES (quick) and SEEDS (0 1 2), or STUDY, a file as in studies/;"
	@echo "    JOBS, how many at once (one a core), and FOLDER, where to (runs, or runs/<study>)"
	@echo "    CIFAR10_ROOT  the folder that holds cifar-10-batches-py (./data)"

env: $(VENV)/.ready ## build the environment in .venv (the other targets do it by themselves)

$(VENV)/.ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: Python 3.10 or later is needed; name one, e.g. make PYTHON=python3.12"; exit 1; }
	@echo "Building the environment in $(VENV): once, some minutes, about 5 GB with PyTorch."
	$(PYTHON) -m venv "$(VENV)"
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt -e .
	@touch "$@"

run-notebook: env ## run stats, training and analysis into one run directory
	@$(PY) run_notebook.py $(NB) $(SETTINGS)

stats: env ## the data: counts, channel statistics, samples, augmentations
	@$(PY) run_notebook.py stats $(SETTINGS)

train: env ## train a network (interrupted, the same command goes on)
	@$(PY) run_notebook.py training $(SETTINGS)

analysis: env ## look at a finished run (RUN=...)
	@$(PY) run_notebook.py analysis $(SETTINGS)

tour: env ## the guided tour, headless: the whole workflow in one notebook
	@$(PY) run_notebook.py tuning_CNN_CIFAR10 $(SETTINGS)

lab: env ## open the notebooks in JupyterLab (LAB="--no-browser" for its own options)
	$(PY) -m jupyter lab --notebook-dir . $(LAB) notebooks/tuning_CNN_CIFAR10.ipynb

predict: env ## classify a image: make predict IMAGE=cat.jpg
	@test -n "$(IMAGE)" || { echo "error: name a image, e.g. make predict IMAGE=cat.jpg"; exit 2; }
	@$(PY) -m tiny_cifar10_net "$(IMAGE)" $(if $(RUN),--run "$(RUN)")

sweep: env ## train RECIPES with SEEDS, or a STUDY, several runs at once
	$(foreach v,SEED PARAMS FORCE RUN,$(if $(findstring command,$(origin $(v))),$(error make sweep \
		takes no $(v): name STUDY, or RECIPES, SEEDS and PROTOCOL; JOBS, FOLDER, DATASET, DEVICE)))
	$(if $(STUDY),$(foreach v,RECIPE RECIPES SEEDS PROTOCOL,$(if $(findstring command,$(origin $(v))),$(error \
		a study names its own recipes and seeds, under val: leave out $(v)))))
	@$(PY) -m sweep $(if $(STUDY),--study "$(STUDY)",$(RECIPES) --seeds $(SEEDS) \
		--protocol "$(PROTOCOL)") --dataset "$(DATASET)" --device "$(DEVICE)" \
		$(if $(JOBS),--jobs "$(JOBS)") $(if $(FOLDER),--folder "$(FOLDER)")

bench: env ## speed beside the reference's loop, into benchmarks/ (about ten minutes; keep the machine quiet)
	@$(PY) benchmarks/bench.py $(BENCH)

results: env ## rebuild the tables and curves of results/ from its run directories
	@$(PY) publish.py

verify-results: env ## evaluate all published weights on the real test set, against their metrics
	@$(PY) publish.py --verify

test: env ## all tests: the modules, then every notebook under nbval
	@$(PY) -m pytest

test-fast: env ## the tests without the notebooks
	@$(PY) -m pytest --ignore tests/test_notebooks.py

lint: env ## style and common mistakes
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

clean: ## remove the environment and caches; runs/ and data/ stay
	@if [ -e "$(VENV)/.ready" ]; then rm -rf "$(VENV)"; fi  # not one of somebody else's
	rm -rf *.egg-info .pytest_cache .ruff_cache __pycache__ */__pycache__ */.ipynb_checkpoints
