# Every command that a person or an agent types; the work is in scripts/, one helper a verb
# (`scripts/run.sh --help` tells more). GNU Make 3.81 reads this file.
#
# Variables, given as NAME=value after the target:
#
#   DATASET   stdlib, climbmix, tinystories or files (prepare, setup)
#   FILES     the folder of text for DATASET=files (prepare); COLUMN: which column of it holds the text (text)
#   BUDGET    seconds of training (300); TIMEOUT: seconds until a run is killed (600); SEED (42)
#   AGAIN     1: run the same train.py again, REFERENCE=1 the last kept one, PAIR=1 both in turn; N: so many runs
#   WAIT      1: wait for another run on this machine to end
#   TAG       the session's name (setup)
#   STATUS    keep, discard or crash; DESC, FOUND, OPEN: text for the row and the journal (log-result)
#   PYTHON    an interpreter that has the packages; without it .venv is built and used

# Text comes through as it was typed, a `$` in it too.
override DESC := $(value DESC)
override FOUND := $(value FOUND)
override OPEN := $(value OPEN)
override FILES := $(value FILES)
override COLUMN := $(value COLUMN)
override PYTHON := $(value PYTHON)
export DESC FOUND OPEN FILES COLUMN PYTHON DATASET TAG STATUS BUDGET TIMEOUT SEED AGAIN REFERENCE PAIR N WAIT

.PHONY: help prepare check bench setup baseline run verdict log-result discard results holdout test lint clean

help:       ## list the targets
	@scripts/help.sh

prepare:    ## environment, dataset, tokenizer, token cache; nothing where all is there
	@scripts/prepare.sh

check:      ## ask the present train.py's model what a run asks it, without training: leaks, shape, memory
	@scripts/check.sh

bench:      ## profile the present train.py on this machine
	@scripts/bench.sh

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

holdout:    ## the night's gain, measured anew on text that nobody selected on
	@scripts/holdout.sh

test:       ## every test
	@scripts/test.sh

lint:       ## ruff and shellcheck
	@scripts/lint.sh

clean:      ## remove the environment and caches; never results
	@scripts/clean.sh
