# Every entry point. `make` alone prints this list.
#
#   make run-notebook RECIPE=baseline SEED=1      settings follow as NAME=value

PYTHON ?= python3
VENV ?= .venv
PY := "$(VENV)/bin/python"
ifneq ($(words $(VENV)),1)
$(error VENV must be one word: make can't have a space in it)
endif

# Settings reach Python through the environment, as TINYCIFAR_<NAME>, and no shell reads them: quotes,
# $ and backticks in a value arrive as they are. An empty setting means its default; what already is
# in the environment under that name stays.
SETTINGS := NB RECIPE PROTOCOL DATASET SEED DEVICE FORCE RUN PARAMS IMAGE ONNX CSV RECIPES SEEDS STUDY JOBS FOLDER TO STORAGE THREADS HEARTBEAT PORT
ON_THE_COMMAND_LINE := $(foreach name,$(.VARIABLES),$(if $(findstring command,$(origin $(name))),$(name)))
UNKNOWN := $(filter-out $(SETTINGS) PYTHON VENV LAB BENCH SITE LOCK CIFAR10_ROOT MAKEFLAGS,$(ON_THE_COMMAND_LINE))
$(foreach name,$(UNKNOWN),$(warning $(name) is no setting here and only goes into the environment: make alone lists them))
define pass_on
override $(1) := $$(value $(1))
export TINYCIFAR_$(1) := $$(or $$(value $(1)),$$(value TINYCIFAR_$(1)))
endef
$(foreach name,$(SETTINGS),$(eval $(call pass_on,$(name))))

# How long a waiting OpenMP thread spins before it sleeps. By default so long that a machine with
# anything else to do trains many times slower; much shorter, and a quiet one loses speed.
export GOMP_SPINCOUNT ?= 30000

# `exec`: what stops make stops what it started.
TINYCIFAR = exec $(PY) -m tinycifar

.DEFAULT_GOAL := help
.PHONY: help env lock resolve run-notebook stats train analysis tour lab predict export sweep study dashboard bench demo site results card verify-results test test-fast lint clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  Settings, e.g. make run-notebook RECIPE=baseline SEED=1 DATASET=cifar10"
	@echo "    NB        which notebooks: stats training analysis      (all three)"
	@echo "    RECIPE    quick, tuned, taught, sprint, baseline, int8  (quick)"
	@echo "    PROTOCOL  val, full or test-selected                    (val)"
	@echo "    DATASET   auto, cifar10 or shapes, the stand-in         (auto)"
	@echo "    SEED      from 0 to 2**32 - 1                           (0)"
	@echo "    DEVICE    auto, cpu, cuda or mps                        (auto)"
	@echo "    RUN       the run directory                             (runs/RECIPE-PROTOCOL-seedSEED)"
	@echo "    FORCE     1 replaces a finished or different run        (0)"
	@echo '    PARAMS    more parameters, e.g. PARAMS="-p epochs 5": those of the notebooks, and any'
	@echo "              field of a recipe"
	@echo "  make sweep instead takes RECIPES (quick) and SEEDS (0 1 2), or STUDY, a file as in studies/;"
	@echo "    JOBS, how many at once (one a core), and FOLDER, where to (runs, or runs/<study>); STORAGE,"
	@echo "    a database's URL, and the same command on other machines: docs/searches.md"
	@echo "  All settings: docs/command-line.md"
	@echo "    CIFAR10_ROOT  the folder that holds cifar-10-batches-py (./data)"

env: $(VENV)/.ready ## build the environment in .venv (the other targets do it by themselves)

$(VENV)/.ready: requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or later is needed; name one, e.g. make PYTHON=python3.12"; exit 1; }
	@echo "Building the environment in $(VENV): once, some minutes, about 5 GB with PyTorch."
	$(PYTHON) -m venv "$(VENV)"
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt -e .
	@touch "$@"

run-notebook: env ## run stats, training and analysis into one run directory
	@$(TINYCIFAR) notebook

stats: env ## the data: counts, channel statistics, samples, augmentations
	@$(TINYCIFAR) notebook stats

train: env ## train a network (interrupted, the same command goes on)
	@$(TINYCIFAR) notebook training

analysis: env ## look at a finished run (RUN=...)
	@$(TINYCIFAR) notebook analysis

tour: env ## the guided tour, headless: the whole workflow in one notebook
	@$(TINYCIFAR) notebook tuning_CNN_CIFAR10

lab: env ## open the notebooks in JupyterLab (LAB="--no-browser" for its own options)
	@exec $(PY) -m jupyter lab --notebook-dir . $(LAB) notebooks/tuning_CNN_CIFAR10.ipynb

comma := ,
# What a target would ignore, it refuses: otherwise the answer is another network's.
define refuse
$(foreach name,$(filter $(1),$(ON_THE_COMMAND_LINE)),$(error make $@ takes no $(name): it takes $(2)))
endef

predict: env ## classify an image: make predict IMAGE=cat.jpg
	$(call refuse,RECIPE SEED PROTOCOL PARAMS FORCE,IMAGE and RUN or ONNX; CSV)
	@$(TINYCIFAR) predict

export: env ## write a run's network as ONNX, in float and int8, and measure both (RUN=taught TO=runs/export)
	$(call refuse,RECIPE SEED PROTOCOL PARAMS FORCE DATASET FOLDER,RUN and TO)
	@$(TINYCIFAR) export

sweep: env ## train RECIPES with SEEDS, or a STUDY (variations, or a search), several runs at once
	$(call refuse,SEED PARAMS FORCE RUN,STUDY$(comma) or RECIPES and SEEDS; PROTOCOL JOBS FOLDER DATASET DEVICE STORAGE THREADS HEARTBEAT)
	@$(TINYCIFAR) sweep

# A sweep of one recipe may call it RECIPE.
sweep: export TINYCIFAR_RECIPES := $(or $(value RECIPES),$(value RECIPE))

study: env ## look at a study's runs (RUN=runs/mine, or results/studies/rates)
	$(call refuse,STUDY RECIPE SEED PROTOCOL FORCE,RUN$(comma) the folder of the runs)
	@$(TINYCIFAR) notebook study

dashboard: env ## a STUDY in the browser while it is trained (pip install optuna-dashboard)
	@$(TINYCIFAR) dashboard

demo: site ## the page that runs the network in a browser, at http://127.0.0.1:8000 (PORT=8000)
	@exec $(PYTHON) -m http.server $(or $(PORT),8000) --bind 127.0.0.1 --directory "$(SITE)"

# What is served, and nothing else: the page, ONNX Runtime for browsers, the networks.
SITE ?= site
WEB := demo/node_modules/onnxruntime-web/dist
site: demo/node_modules/.package-lock.json ## build that page into site/ (needs npm, of Node.js)
	mkdir -p "$(SITE)"
	cp -R demo/index.html demo/style.css demo/demo.js demo/drawn results/export/*.onnx \
		$(WEB)/ort.wasm.bundle.min.mjs $(WEB)/ort-wasm-simd-threaded.wasm "$(SITE)"

demo/node_modules/.package-lock.json: demo/package.json demo/package-lock.json
	@command -v npm > /dev/null || { echo "error: npm is needed: install Node.js, 20 or later"; exit 1; }
	cd demo && npm ci

bench: env ## speed beside the reference's loop, into benchmarks/ (about ten minutes; keep the machine quiet)
	@exec $(PY) benchmarks/bench.py $(BENCH)

results: env ## rebuild the tables, numbers and figures of README, docs/ and results/
	@$(TINYCIFAR) publish

card: env ## measure what results/MODEL_CARD.md says of the default weights (needs CIFAR-10)
	@$(TINYCIFAR) card

verify-results: env ## evaluate all published weights on the real test set, against their metrics
	@$(TINYCIFAR) verify

test: env ## all tests: the modules, then every notebook under nbval
	@exec $(PY) -m pytest

test-fast: env ## the tests without the notebooks
	@exec $(PY) -m pytest --ignore tests/test_notebooks.py

lint: env ## style, common mistakes and types
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

lock: env ## write constraints.txt again, for what requirements.txt says now (LOCK=--upgrade: the newest)
	$(PY) -m pip install --quiet --disable-pip-version-check uv==0.13.9
	$(PY) -m uv pip compile --quiet --universal --python-version 3.11 --no-annotate \
		--custom-compile-command "make lock" $(LOCK) requirements.txt -o constraints.txt

resolve: env ## whether all pins can be had for each Python from 3.11 to 3.14 (some minutes, nothing is installed)
	@for version in 3.11.9 3.12.9 3.13.9 3.14.0; do \
		$(PY) -m pip install --dry-run --quiet --ignore-installed --python-version $$version \
			--only-binary=:all: --target build/none -r requirements.txt -c constraints.txt || exit 1; \
		echo "Python $$version: all pins can be had"; \
	done

clean: ## remove the environment and caches; runs/ and data/ stay
	@if [ -e "$(VENV)/.ready" ]; then rm -rf "$(VENV)"; fi  # not one of somebody else's
	rm -rf build site demo/node_modules *.egg-info .pytest_cache .ruff_cache .mypy_cache __pycache__ */__pycache__ */.ipynb_checkpoints
