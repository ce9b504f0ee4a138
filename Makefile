# `make demo` and `make test` are all a newcomer needs; both set up .venv first.
PYTHON ?= python3.11
BIN := .venv/bin
RECIPE ?= jobs/recipes/digits-llamagen.yaml
DEMO := --config jobs/recipes/digits-llamagen.yaml --config jobs/recipes/demo.yaml
DEMO_TEXT := --config jobs/recipes/digits-text.yaml --config jobs/recipes/demo-text.yaml
export RAY_USAGE_STATS_ENABLED ?= 0

# A text as one word of the shell, whatever is in it: folders may have spaces and quotes in their names.
quoted = '$(subst ','\'',$(1))'

.PHONY: setup demo demo-text full ablate test test-slow test-faults lint format assets bench gpu-check ui clean

setup: .venv/ready

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[dev,export,fid,hf,serve,text]'
	touch $@

# Pairs, student, report: the embedded default in a short form, on two cores, in minutes.
demo: setup
	$(BIN)/python jobs/generate_pairs.py $(DEMO)
	$(BIN)/python jobs/distill.py $(DEMO)
	$(BIN)/python jobs/evaluate.py $(DEMO)

# The same with captions: a student that draws "a bold 7 leaning right at the top left".
demo-text: setup
	$(BIN)/python jobs/generate_pairs.py $(DEMO_TEXT)
	$(BIN)/python jobs/distill.py $(DEMO_TEXT)
	$(BIN)/python jobs/evaluate.py $(DEMO_TEXT)

# The same three jobs with a whole recipe: make full RECIPE=jobs/recipes/digits-llamagen.yaml
full: setup
	$(BIN)/python jobs/generate_pairs.py --config $(call quoted,$(RECIPE))
	$(BIN)/python jobs/distill.py --config $(call quoted,$(RECIPE))
	$(BIN)/python jobs/evaluate.py --config $(call quoted,$(RECIPE))

# One setting at a time around the digits: two training seeds of fifteen recipes, one table.
ablate: setup
	$(BIN)/python jobs/ablate.py --config jobs/recipes/digits-llamagen.yaml --config jobs/recipes/ablate-digits.yaml

# Tests that start Ray are in two of the processes (tests/conftest.py): they wait more than they compute.
test: setup
	$(BIN)/python -m pytest -n 3 --dist loadgroup

test-slow: setup
	$(BIN)/python -m pytest -m 'slow or not slow'

# Everything that breaks something: disks, S3, files, and random kills of drivers, workers and nodes in all three jobs.
test-faults: setup
	$(BIN)/python -m pytest -m faults

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Train the embedded default's networks again from the 5,000 digits (about an hour on two cores).
assets: setup
	$(BIN)/python jobs/train_digits.py

bench: setup
	$(BIN)/python jobs/benchmark.py

# On a machine with a GPU, ten minutes: tests, speed, pairs, memory, training, one sheet. Installs and downloads nothing.
# The Python of .venv if that is there, else the one at hand; CHECK='--only pairs' has flags of jobs/gpu_check.py.
CHECK ?=
gpu-check:
	$(or $(wildcard $(BIN)/python),python3) jobs/gpu_check.py $(CHECK)

# MLflow 3 opens on its page for language models; the address that is printed leads to the runs of the three jobs.
RUN ?= runs/demo
STORE = sqlite:///$(if $(filter /%,$(firstword $(RUN))),,$(CURDIR)/)$(RUN)/mlflow.db
ui: setup
	@$(BIN)/python -m pipeline.services.mlflow_store $(call quoted,$(RUN))
	$(BIN)/mlflow ui --host 127.0.0.1 --port 5000 --backend-store-uri $(call quoted,$(STORE))

clean:
	rm -rf runs
