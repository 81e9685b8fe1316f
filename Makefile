# make demo: set-up, then TutorNet from end to end on the embedded corpus.
# make test: set-up, then the tests. make test-all: the slow ones too.
# make lock: the newest versions in the ranges, for the next set-ups.
PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
RECIPE := recipes/LibriSpeech/TutorNet

.PHONY: demo test test-all test-oldest test-newest lock lint audit

# Exactly what is locked, the package itself, and no build package beside them.
# Made anew when the lock changes; a set-up cut short is done again.
.venv/ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, " + sys.executable + " is " + sys.version.split()[0]) if sys.version_info < (3, 10) else 0'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --require-hashes --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# The baseline trains beside the student's teacher, one thread each: of networks
# so small, a second thread makes neither faster.
demo: .venv/ready
	@echo "The baseline trains beside the teacher: $(RECIPE)/results/ctc_lstm.log"
	@cd $(RECIPE) && mkdir -p results && export OMP_NUM_THREADS=1 && { \
	    $(BIN)/python train.py hparams/ctc_lstm.yaml --noprogressbar > results/ctc_lstm.log 2>&1 & \
	    alone=$$!; \
	    $(BIN)/python train.py hparams/rkd_lstm.yaml || { kill $$alone; exit 1; }; \
	    wait $$alone || { tail -n 5 results/ctc_lstm.log; exit 1; }; \
	}

# Files are shared out among the cores, since what a file's tests need is made once
# for all of them.
PYTEST := python -m pytest --numprocesses auto --dist loadfile

test: .venv/ready
	$(BIN)/$(PYTEST)

test-all: .venv/ready
	$(BIN)/$(PYTEST) -m ""

# It resolves versions, and makes environments of other versions than those locked.
UV := .venv-uv/bin/uv
$(UV):
	$(PYTHON) -m venv .venv-uv
	.venv-uv/bin/python -m pip install --quiet uv==0.13.9

lock: $(UV)
	$(UV) pip compile --quiet --universal --python-version 3.10 --generate-hashes --all-extras --upgrade \
	    --custom-compile-command "make lock" pyproject.toml --output-file requirements.lock

# The fast tests at both ends of the ranges of requirements.txt and pyproject.toml
test-oldest: RESOLUTION := lowest-direct
test-newest: RESOLUTION := highest
test-oldest test-newest: $(UV)
	$(UV) venv --quiet --clear --python $(PYTHON) .venv-$@
	$(UV) pip install --quiet --python .venv-$@ --resolution $(RESOLUTION) --editable '.[all,dev]'
	$(UV) pip list --python .venv-$@
	.venv-$@/bin/$(PYTEST)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Known holes of what is installed, by PyPI's database; in a place of its own,
# for pip-audit needs other packages than the tests. Strict: without the database
# it fails, where it would find no hole otherwise.
.venv-audit/ready:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet 'pip-audit>=2.7,<3'
	touch $@

audit: .venv/ready .venv-audit/ready
	$(BIN)/python -m pip freeze --exclude-editable > .venv-audit/installed.txt
	.venv-audit/bin/pip-audit --strict --no-deps --disable-pip \
	    --requirement .venv-audit/installed.txt
