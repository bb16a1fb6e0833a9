# Thin calls of `python -m cifar_ignite`; `make` alone prints the help below.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo train evaluate predict export compare doctor data tensorboard models docs bench accuracy test test-fast lint format

# Only the command line sets these variables: shells and containers export such names for other programs.
variables := MODEL RECIPE DATA DATA_DIR OUTPUT_DIR SET SEED EPOCHS RESUME NPROC CHECKPOINT TEST_FILE TTA IMAGES $\
	OUT SEEDS JOBS TORCH_INDEX
unknown := $(filter-out $(variables) PYTHON,$(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name))))
ifneq ($(unknown),)
$(error $(unknown): no such variable; known are $(variables) PYTHON)
endif
exported := $(strip $(foreach name,$(variables),$(if $(value $(name)),$(if $(filter environment,$(origin $(name))),$(name)))))
ifneq ($(exported),)
example := make $(MAKECMDGOALS) $(foreach name,$(exported),$(name)=...)
$(warning $(exported): exported in the environment, which is ignored; to set it: $(strip $(example)))
$(foreach name,$(exported),$(eval $(name) :=))
endif

# PYTHON, by default that of the active environment, is used if the package is installed in it; otherwise .venv is
# created once. Without the current directory (""), whose checkout would count as an installed package.
PYTHON ?= python3
is_installed := $(shell $(PYTHON) -c 'import sys; sys.path = [path for path in sys.path if path]; $\
	import importlib.metadata as metadata; metadata.version("cifar-ignite")' 2>/dev/null && echo yes)
run := $(if $(is_installed),$(PYTHON),.venv/bin/python)
environment := $(if $(is_installed),,.venv/.stamp)

# A variable as one word of the shell, whatever it contains. The spaces before -- belong to the words.
escape = $(subst ','\'',$1)
option = $(if $(value $1), --$2 '$(call escape,$(value $1))')
set = $(if $(value $1), --set $2='$(call escape,$(value $1))')
overrides = $(call set,DATA_DIR,data.root)$(call set,DATA,data.dataset)$(call set,OUTPUT_DIR,output_dir)$(sets)
# SET is split before the words that contain "=": the list in SET="augment.erasing_scale=[0.02, 0.2] seed=1" is one value.
empty :=
space := $(empty) $(empty)
tab := $(empty)	$(empty)
marked = $(foreach word,$(value SET),$(if $(findstring =,$(word)),$(tab))$(word))
sets = $(if $(strip $(marked)), --set '$(subst $(tab),,$(subst $(space)$(tab),' --set ',$(call escape,$(marked))))')
# A recipe, and a dataset other than CIFAR-10, are experiments of their own: se, se_fast, se_synthetic.
recipe := $(or $(value MODEL),se)$(if $(value RECIPE),_$(value RECIPE))
suffix := $(if $(filter-out cifar10,$(value DATA)),_$(value DATA))
experiment := $(if $(suffix), --set experiment='$(call escape,$(recipe)$(suffix))')
# NPROC processes with torchrun, each with its share of the cores (unless OMP_NUM_THREADS is set).
torchrun = n='$(call escape,$(value NPROC))'; case "$$n" in 0*|*[!0-9]*) \
	echo "cifar_ignite: NPROC: expected an integer of at least 1, got $$n" >&2; exit 2;; esac; \
	export OMP_NUM_THREADS="$${OMP_NUM_THREADS:-$$((($$(getconf _NPROCESSORS_ONLN) + n - 1) / n))}"; \
	$(run) -m torch.distributed.run --standalone --nproc_per_node="$$n"
launch = $(if $(value NPROC),$(torchrun),$(run))

help: ## Print this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 } /^## / { print substr($$0, 4) }' Makefile

demo: $(environment) ## Install, train and evaluate on synthetic data, without a download, in a few minutes: EPOCHS= SEED=
	$(run) -m cifar_ignite train --config demo$(call set,EPOCHS,train.epochs)$(call set,SEED,seed)$(overrides)
	$(run) -m cifar_ignite evaluate --model demo$(overrides)

train: $(environment) ## Train a model: MODEL=se|stochastic|hybrid RECIPE=fast|best EPOCHS= SEED= RESUME=latest|PATH NPROC=
	$(launch) -m cifar_ignite train --config '$(call escape,$(recipe))'$(experiment)$(call set,EPOCHS,train.epochs)$(call set,SEED,seed)$(overrides)$(call option,RESUME,resume)

# The model of a target: MODEL= and RECIPE= name an experiment, CHECKPOINT= a file; otherwise the latest best model.
trained = $(if $(value MODEL)$(value RECIPE), --model '$(call escape,$(recipe)$(suffix))')$(call option,CHECKPOINT,checkpoint)
tta = $(if $(value TTA), --tta '$(call escape,$(patsubst 1,flip,$(value TTA)))')

evaluate: $(environment) ## Predict the test set: MODEL= RECIPE= or CHECKPOINT= (default: the latest best model) TEST_FILE= TTA=1|shift NPROC=
	$(launch) -m cifar_ignite evaluate$(trained)$(call option,TEST_FILE,test-file)$(tta)$(overrides)

predict: $(environment) ## Classify your own images: IMAGES=file or directory, MODEL= RECIPE= or CHECKPOINT=, TTA=1|shift
	@$(if $(value IMAGES),:,echo "IMAGES: name an image or a directory of images: make predict IMAGES=path" >&2; exit 2)
	$(run) -m cifar_ignite predict$(trained)$(tta)$(overrides) -- '$(call escape,$(value IMAGES))'

export: $(environment) ## Write a model as a torch.export program and, with the extra onnx, as ONNX: MODEL= RECIPE= or CHECKPOINT=
	$(run) -m cifar_ignite export$(trained)$(overrides)

compare: $(environment) ## Compare all runs in a table and a figure
	$(run) -m cifar_ignite compare$(overrides)

doctor: $(environment) ## Check installation, device, data and disk: DATA= DATA_DIR=
	$(run) -m cifar_ignite doctor$(overrides)

data: $(environment) ## Count the images per class and draw samples of each class: DATA=folder DATA_DIR=photos
	$(run) -m cifar_ignite data$(overrides)

tensorboard: $(environment) ## Show the runs in TensorBoard (with the extra tensorboard)
	@$(run) -c 'import tensorboard' 2>/dev/null || { echo "TensorBoard is not installed: $(run) -m pip install -e '.[tensorboard]'" >&2; exit 2; }
	$(run) -m tensorboard.main --logdir '$(call escape,$(or $(value OUTPUT_DIR),outputs))/training_runs'

models: $(environment) ## List the models with parameters and multiply-adds
	@$(run) -m cifar_ignite models

docs: $(environment) ## Generate docs/configuration.md and configs/schema.json, after a change of config.py
	PYTHONIOENCODING=utf-8 PYTHONOPTIMIZE= $(run) -m cifar_ignite config-reference > docs/.configuration.md && mv docs/.configuration.md docs/configuration.md
	PYTHONIOENCODING=utf-8 PYTHONOPTIMIZE= $(run) -m cifar_ignite schema > configs/.schema.json && mv configs/.schema.json configs/schema.json

bench: $(environment) ## Measure images per second against a bare training step and a tutorial loop: MODEL= RECIPE= OUT=file
	$(run) -m benchmarks.throughput --config '$(call escape,$(recipe))'$(overrides)$(call option,OUT,out)

accuracy: $(environment) ## Measure test accuracy over seeds, all training images: MODEL=se RECIPE=fast SEEDS=5 JOBS=1 EPOCHS= OUT=file
	$(run) -m benchmarks.accuracy --config '$(call escape,$(recipe))'$(experiment)$(call set,EPOCHS,train.epochs)$(call set,SEED,seed)$(overrides)$(call option,SEEDS,seeds)$(call option,JOBS,jobs)$(call option,OUT,out)

test: $(environment) ## Run the tests
	@$(run) -c 'import pytest' || { echo "the developer tools are missing: $(run) -m pip install -e '.[dev]'" >&2; exit 2; }
	OMP_NUM_THREADS=1 $(run) -m pytest -n auto --maxprocesses 4 --dist worksteal

test-fast: $(environment) ## Run the tests that take milliseconds, in less than a minute
	OMP_NUM_THREADS=1 $(run) -m pytest -n auto --maxprocesses 4 -m 'not slow'

lint: $(environment) ## Check style and types (ruff, mypy)
	$(run) -m ruff check .
	$(run) -m ruff format --check .
	$(run) -m mypy

format: $(environment) ## Format the code
	$(run) -m ruff check --fix .
	$(run) -m ruff format .

install: $(environment) ## Create .venv, as other targets do unless PYTHON= has the package: PYTHON= TORCH_INDEX=

## Everywhere: DATA=cifar10|cifar100|folder|synthetic, DATA_DIR=directory of the dataset, OUTPUT_DIR=, SET="optimizer.lr=0.1 augment.erasing_scale=[0.02, 0.2]"

.venv/.stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "cifar_ignite requires Python 3.10 or later; name one: make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(if $(value TORCH_INDEX),.venv/bin/python -m pip install --quiet --index-url '$(call escape,$(value TORCH_INDEX))' torch torchvision)
	.venv/bin/python -m pip install --quiet --editable '.[dev]'
	@touch $@
