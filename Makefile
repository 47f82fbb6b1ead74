# Every command that a person or an agent types; the work is in scripts/, one helper a verb
# (`scripts/run.sh --help` tells more). GNU Make 3.81 reads this file.
#
# Variables, given as NAME=value after the target:
#
#   DATASET   stdlib, climbmix, tinystories or files (prepare, setup)
#   FILES     the folder of text for DATASET=files (prepare)
#   BUDGET    seconds of training (300); TIMEOUT: seconds until a run is killed (600); SEED (42)
#   AGAIN     1: run a train.py that was run before; WAIT=1: wait for another run to end
#   TAG       the session's name (setup)
#   STATUS    keep, discard or crash; DESC, FOUND, OPEN: text for the row and the journal (log-result)
#   PYTHON    an interpreter that has the packages; without it .venv is built and used

# Text comes through as it was typed, a `$` in it too.
override DESC := $(value DESC)
override FOUND := $(value FOUND)
override OPEN := $(value OPEN)
override FILES := $(value FILES)
override PYTHON := $(value PYTHON)
export DESC FOUND OPEN FILES PYTHON DATASET TAG STATUS BUDGET TIMEOUT SEED AGAIN WAIT

.PHONY: help prepare bench tune setup baseline run verdict log-result discard results test lint clean

help:       ## list the targets
	@scripts/help.sh

prepare:    ## environment, dataset, tokenizer, token cache; nothing where all is there
	@scripts/prepare.sh

bench:      ## profile the present train.py on this machine
	@scripts/bench.sh

tune:       ## fit depth, step and batch size in train.py to this machine and BUDGET
	@scripts/tune.sh

setup:      ## open a session: make setup TAG=nov24 [DATASET=climbmix]
	@scripts/setup.sh

baseline:   ## prepare, run train.py as it is, log it as the baseline
	@scripts/baseline.sh

run:        ## one experiment of the committed train.py
	@scripts/run.sh

verdict:    ## keep, discard, rerun or judge: the newest run against the last kept one
	@scripts/verdict.sh

log-result: ## log the newest run: make log-result STATUS=keep DESC="…" [FOUND="…" OPEN="…"]
	@scripts/log-result.sh

discard:    ## put the branch back on the last kept commit
	@scripts/discard.sh

results:    ## the table of experiments, the best marked
	@scripts/results.sh

test:       ## every test
	@scripts/test.sh

lint:       ## ruff and shellcheck
	@scripts/lint.sh

clean:      ## remove the environment and caches; never results
	@scripts/clean.sh
