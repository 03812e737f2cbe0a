# `make` alone prints the targets. Every target makes .venv first when it is not there.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

# Not given, the demo's, or for other shards that of the student.
RECIPE ?=
OUT ?= data/demo
# Not given, they are what the recipe says.
STUDENT ?=
SHARDS ?=
METHOD ?=
# What `make compare` trains.
METHODS ?= plain kd dad
SEED ?=
ARGS ?=
LAUNCHER ?=
WORKERS ?=
N ?= 50
FROM = $(or $(SHARDS),$(filter-out data/demo,$(OUT)))
LEARN = $(if $(RECIPE),--recipe "$(RECIPE)") $(if $(STUDENT),--student "$(STUDENT)") $(if $(FROM),--shards "$(FROM)")
# Two busy processes on the same cores would otherwise spin against each other, at a tenth of the speed.
export OMP_WAIT_POLICY ?= PASSIVE
RENDITIONS := data/renditions

.DEFAULT_GOAL := help
.PHONY: help renditions shards status verify train compare eval export demo-table bench-generate bench-read bench-cost test chaos lint clean

help: ## print this list
	@echo "targets (variables: RECIPE DATA OUT LAUNCHER WORKERS STUDENT SHARDS METHOD METHODS SEED RUN_DIR EXPORT N ARGS):"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# .venv is whole when this file is there; setup.cfg decides what goes in.
$(VENV)/ready: setup.cfg
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (about two minutes, once)"
	@$(RUN) -m pip install -qq --disable-pip-version-check --editable '.[test]'
	@touch $@

$(RENDITIONS)/sketch-unseen/done: | $(VENV)/ready
	@$(RUN) -m pipeline.renditions compose --out $(RENDITIONS)

renditions: $(RENDITIONS)/sketch-unseen/done ## compose the demo's image sets (train, val, renditions, sketches)

# The demo composes its own images; any other recipe brings DATA.
shards: $(VENV)/ready $(if $(DATA),,$(RENDITIONS)/sketch-unseen/done) ## images in, shards out (RECIPE DATA OUT LAUNCHER=local|slurm|ray WORKERS)
	@$(RUN) -m pipeline generate --recipe "$(or $(RECIPE),demo)" --out "$(OUT)" $(if $(DATA),--data "$(DATA)") $(if $(LAUNCHER),--launcher $(LAUNCHER)) \
		$(if $(WORKERS),--workers $(WORKERS)) $(ARGS)

status: $(VENV)/ready ## say what OUT holds: done, running, failed, missing, damaged (ARGS=--watch)
	@$(RUN) -m pipeline status "$(OUT)" $(ARGS)

verify: $(VENV)/ready ## check every checksum, count and label of OUT; ask the teacher again about random samples
	@$(RUN) -m pipeline verify "$(OUT)" $(ARGS)

# The demo's students learn from the demo's shards and are validated on its images: make those first.
DEMO := $(if $(filter-out demo,$(RECIPE))$(filter-out data/demo data/demo/,$(SHARDS) $(OUT)),,$(RENDITIONS)/sketch-unseen/done data/demo/manifest.parquet)
data/demo/manifest.parquet:
	@$(MAKE) --no-print-directory shards RECIPE=demo OUT=data/demo DATA=

train: $(VENV)/ready $(DEMO) ## shards in, a student out (STUDENT SHARDS METHOD=plain|kd|dad|dat|… SEED)
	@$(RUN) -m trainer train $(LEARN) $(if $(METHOD),--method $(METHOD)) $(if $(SEED),--seed $(SEED)) $(ARGS)

compare: ## train a student by each of METHODS (plain kd dad) with one seed, then eval
	@for method in $(METHODS); do $(MAKE) --no-print-directory train METHOD=$$method || exit; done
	@$(MAKE) --no-print-directory eval

eval: $(VENV)/ready $(RENDITIONS)/sketch-unseen/done ## score every student in runs/ on every image set, as a table and a picture
	@$(RUN) -m trainer eval runs --data "$(or $(DATA),$(RENDITIONS))" $(ARGS)

demo-table: $(VENV)/ready $(DEMO) ## train 3 seeds of plain, KD and DAD (about an hour on two cores)
	@$(RUN) -m trainer demo-table $(LEARN) $(ARGS)

bench-generate: $(VENV)/ready $(if $(DATA),,$(RENDITIONS)/sketch-unseen/done) ## measure images/s of stage 1 and where the time goes (RECIPE DATA)
	@$(RUN) -m pipeline.speed.benchmark --recipe "$(or $(RECIPE),demo)" $(if $(DATA),--set source.data="$(DATA)") $(ARGS)

bench-read: $(VENV)/ready ## measure this reader beside a bare loop, webdataset and ImageFolder
	@OMP_NUM_THREADS=1 $(RUN) -m shards bench $(ARGS)

bench-cost: $(VENV)/ready $(DEMO) ## measure what each method costs beside plain training (STUDENT SHARDS RECIPE)
	@$(RUN) -m trainer.ledger.cost $(LEARN) $(ARGS)

export: $(VENV)/ready ## write a student as a folder for timm and the Hugging Face hub (RUN_DIR EXPORT; ARGS=--onnx)
	@test -n "$(RUN_DIR)" || { echo "error: name the student, for example make export RUN_DIR=runs/resnet18-dad-s0" >&2; exit 2; }
	@$(RUN) -m trainer export "$(RUN_DIR)" "$(or $(EXPORT),$(RUN_DIR)/export)" $(ARGS)

test: $(VENV)/ready ## run the test suite, in up to four processes
	@OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(ARGS)

chaos: $(VENV)/ready ## kill stage 1 N times, fill its disk, set its clock back; compare the bytes (N SEED)
	@$(RUN) -m tests.chaos --kills $(N) $(if $(SEED),--seed $(SEED)) $(ARGS)

lint: $(VENV)/ready ## run ruff and mypy
	@$(RUN) -m ruff check . && $(RUN) -m ruff format --check . && $(RUN) -m mypy

clean: ## remove .venv and caches; data/, runs/ and reports/ stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
