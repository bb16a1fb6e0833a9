# Thin calls of `python -m cifar_ignite`; `make` alone prints this file's own help.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo train evaluate predict export compare doctor tensorboard models schema bench accuracy test lint format

# An activated conda or virtual environment that holds the package is used; otherwise .venv is built once.
PYTHON ?= python3
active := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX))
# -I: without it, a checkout in the current folder would pass for an installed package.
holds_package := $(if $(active),$(shell '$(active)/bin/python' -I -c \
	'import importlib.metadata as m; m.version("cifar-ignite")' 2>/dev/null && echo yes))
ifeq ($(holds_package),yes)
run := '$(active)/bin/python'
environment :=
else
run := .venv/bin/python
environment := .venv/.stamp
endif

# What a person typed, as one word of the shell, whatever is in it. The spaces before -- are part of the words.
escape = $(subst ','\'',$1)
option = $(if $(value $1), --$2 '$(call escape,$(value $1))')
set = $(if $(value $1), --set $2='$(call escape,$(value $1))')
overrides = $(call set,DATA_DIR,data.root)$(call set,DATA,data.source)$(call set,OUTPUT_DIR,output_dir)$\
	$(foreach item,$(value SET), --set '$(call escape,$(item))')
# A recipe, and other data than CIFAR-10, are experiments of their own: se, se_fast, se_synthetic.
recipe := $(or $(value MODEL),se)$(if $(value RECIPE),_$(value RECIPE))
suffix := $(if $(filter-out cifar10,$(value DATA)),_$(value DATA))
experiment := $(if $(suffix), --set experiment='$(call escape,$(recipe)$(suffix))')
# NPROC processes by torchrun, each with its share of the cores (OMP_NUM_THREADS= decides otherwise).
torchrun = n='$(call escape,$(value NPROC))'; case "$$n" in 0*|*[!0-9]*) \
	echo "cifar_ignite: NPROC: expected a whole number from 1 on, got $$n" >&2; exit 2;; esac; \
	export OMP_NUM_THREADS="$${OMP_NUM_THREADS:-$$((($$(getconf _NPROCESSORS_ONLN) + n - 1) / n))}"; \
	$(run) -m torch.distributed.run --standalone --nproc_per_node="$$n"
launch = $(if $(value NPROC),$(torchrun),$(run))

help: ## Print this help
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 } /^## / { print substr($$0, 4) }' Makefile

demo: $(environment) ## Set up, train and evaluate on the embedded data: no download, a few minutes: EPOCHS= SEED=
	$(run) -m cifar_ignite train --config configs/demo.json$(call set,EPOCHS,train.epochs)$(call set,SEED,seed)$(overrides)
	$(run) -m cifar_ignite evaluate --model demo$(overrides)

train: $(environment) ## Train a model: MODEL=se|stochastic|hybrid RECIPE=fast|best EPOCHS= SEED= RESUME=latest|PATH NPROC=
	$(launch) -m cifar_ignite train --config 'configs/$(call escape,$(recipe)).json'$(experiment)$(call set,EPOCHS,train.epochs)$(call set,SEED,seed)$(overrides)$(call option,RESUME,resume)

# Which trained model a target takes: MODEL= and RECIPE= name an experiment, CHECKPOINT= a file; else the newest best one.
trained = $(if $(value MODEL)$(value RECIPE)$(suffix), --model '$(call escape,$(recipe)$(suffix))')$(call option,CHECKPOINT,checkpoint)
tta = $(if $(value TTA), --tta '$(call escape,$(patsubst 1,flip,$(value TTA)))')

evaluate: $(environment) ## Predict the test set: MODEL= RECIPE= or CHECKPOINT= (default: the newest best model) TEST_FILE= TTA=1|shift NPROC=
	$(launch) -m cifar_ignite evaluate$(trained)$(call option,TEST_FILE,test-file)$(tta)$(overrides)

predict: $(environment) ## Say what is in your own pictures: IMAGES=file or folder, MODEL= RECIPE= or CHECKPOINT=, TTA=1|shift
	@$(if $(value IMAGES),:,echo "name a picture or a folder of pictures: make predict IMAGES=path" >&2; exit 2)
	$(run) -m cifar_ignite predict$(trained)$(tta)$(overrides) -- '$(call escape,$(value IMAGES))'

export: $(environment) ## Write a model for use elsewhere (torch.export; ONNX with the extra onnx): MODEL= RECIPE= or CHECKPOINT=
	$(run) -m cifar_ignite export$(trained)$(overrides)

compare: $(environment) ## A table and a picture of all runs
	$(run) -m cifar_ignite compare$(overrides)

doctor: $(environment) ## Check installation, device, data and disk
	$(run) -m cifar_ignite doctor$(overrides)

tensorboard: $(environment) ## Look at the runs in a browser (with the extra tensorboard)
	@$(run) -c 'import tensorboard' 2>/dev/null || { echo "TensorBoard is not installed: $(run) -m pip install -e '.[tensorboard]'" >&2; exit 2; }
	$(run) -m tensorboard.main --logdir '$(call escape,$(or $(value OUTPUT_DIR),outputs))/training_runs'

models: $(environment) ## List the models with their parameters and multiply-adds
	@$(run) -m cifar_ignite models

schema: $(environment) ## Write configs/schema.json anew, after a change of config.py
	$(run) -m cifar_ignite schema > configs/.schema && mv configs/.schema configs/schema.json

bench: $(environment) ## Measure images a second against the limit and a tutorial's loop: MODEL= RECIPE= OUT=file
	$(run) -m benchmarks.throughput --config 'configs/$(call escape,$(recipe)).json'$(overrides)$(call option,OUT,out)

accuracy: $(environment) ## Test accuracy over seeds, all images: MODEL=se RECIPE=fast SEEDS=5 EPOCHS= OUT=file
	$(run) -m benchmarks.accuracy --config 'configs/$(call escape,$(recipe)).json'$(experiment)$(call set,EPOCHS,train.epochs)$(call set,SEED,seed)$(overrides)$(call option,SEEDS,seeds)$(call option,OUT,out)

test: $(environment) ## Run the tests
	@$(run) -c 'import pytest' || { echo "the active environment lacks the tools: pip install -e '.[dev]'" >&2; exit 2; }
	$(run) -m pytest

lint: $(environment) ## Check style and types (ruff, mypy)
	$(run) -m ruff check .
	$(run) -m ruff format --check .
	$(run) -m mypy

format: $(environment) ## Put the code into the project's style
	$(run) -m ruff check --fix .
	$(run) -m ruff format .

install: $(environment) ## Build .venv (done by the other targets when needed): PYTHON= TORCH_INDEX=

## Anywhere: DATA_DIR=folder of cifar-10-batches-py, DATA=synthetic, OUTPUT_DIR=, SET="optimizer.lr=0.1 train.epochs=5"

.venv/.stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "cifar_ignite needs Python 3.10 or newer; name one: make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(if $(value TORCH_INDEX),.venv/bin/python -m pip install --quiet --index-url '$(call escape,$(value TORCH_INDEX))' torch torchvision)
	.venv/bin/python -m pip install --quiet --editable '.[dev]'
	@touch $@
