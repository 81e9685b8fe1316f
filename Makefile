# make demo: set-up, then TutorNet from end to end on the embedded corpus.
# make test: set-up, then the tests. make test-all: the slow ones too.
PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
RECIPE := recipes/LibriSpeech/TutorNet

.PHONY: demo test test-all lint audit

# Made anew when a requirement changes; a set-up cut short is done again.
.venv/ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, " + sys.executable + " is " + sys.version.split()[0]) if sys.version_info < (3, 10) else 0'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

.venv/ready-to-test: .venv/ready requirements-dev.txt
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

# The student alone trains beside its twin's teacher, one thread each: of networks
# so small, a second thread makes neither faster.
demo: .venv/ready
	@echo "The student alone trains beside the teacher: $(RECIPE)/results/ctc_lstm.log"
	@cd $(RECIPE) && mkdir -p results && export OMP_NUM_THREADS=1 && { \
	    $(BIN)/python train.py hparams/ctc_lstm.yaml --noprogressbar > results/ctc_lstm.log 2>&1 & \
	    alone=$$!; \
	    $(BIN)/python train.py hparams/rkd_lstm.yaml || { kill $$alone; exit 1; }; \
	    wait $$alone || { tail -n 5 results/ctc_lstm.log; exit 1; }; \
	}

# Files are shared out among the cores, since what a file's tests need is made once
# for all of them.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist loadfile

test: .venv/ready-to-test
	$(PYTEST)

test-all: .venv/ready-to-test
	$(PYTEST) -m ""

lint: .venv/ready-to-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Known holes of what is installed, by PyPI's database; in a place of its own,
# for pip-audit needs other packages than the tests. Strict: without the database
# it fails, where it would find no hole otherwise.
.venv/audit/ready:
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/python -m pip install --quiet 'pip-audit>=2.7,<3'
	touch $@

audit: .venv/ready-to-test .venv/audit/ready
	$(BIN)/python -m pip freeze --exclude-editable > .venv/audit/installed.txt
	.venv/audit/bin/pip-audit --strict --no-deps --disable-pip \
	    --requirement .venv/audit/installed.txt
