# make demo: set-up, then TutorNet from end to end on the embedded corpus.
# make test: set-up, then the tests. make test-all: the slow ones too.
PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
RECIPE := recipes/LibriSpeech/TutorNet

.PHONY: demo test test-all lint

# Made anew when a requirement changes; a set-up cut short is done again.
.venv/ready: requirements.txt requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, " + sys.executable + " is " + sys.version.split()[0]) if sys.version_info < (3, 10) else 0'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

demo: .venv/ready
	cd $(RECIPE) && $(BIN)/python train.py hparams/ctc_lstm.yaml
	cd $(RECIPE) && $(BIN)/python train.py hparams/rkd_lstm.yaml

test: .venv/ready
	$(BIN)/python -m pytest

test-all: .venv/ready
	$(BIN)/python -m pytest -m ""

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
