# Every command that a person or an agent types; the work is in scripts/, one helper a verb
# (`scripts/run.sh --help` tells more). GNU Make 3.81 reads this file.
#
# Variables, given as NAME=value after the target. `make setup` keeps BUDGET, TIMEOUT, NPROC, HOSTS, DEVICE, FILES and
# COLUMN for the session, so that no later command needs them:
#
#   DATASET   stdlib, climbmix, tinystories or files (prepare, setup)
#   FILES     the folder of text for DATASET=files (prepare); COLUMN: which column of it holds the text (text)
#   BUDGET    seconds of training (300); TIMEOUT: seconds until a run is killed (BUDGET + 300, at least 600)
#   NPROC     train one model on so many devices of this machine, or of each of HOSTS
#   HOSTS     the machines of a group, this one first: mac1.local,mac2.local, or a hostfile of mlx.launch
#   DEVICE    the number of the GPU to take; without it the first free one
#   SEED      the seed of this run (42)
#   AGAIN     1: run the same train.py again, REFERENCE=1 the last kept one, PAIR=1 both in turn; N: so many runs
#   WAIT      1: wait for another run on this machine to end
#   ALL       1: every session's table (results), the slow tests as well (test)
#   ON_RESULT a command of yours that gets the summary of each run on its standard input (run, holdout)
#   TAG       the session's name (setup, report); TUNE=0: without fitting train.py (setup)
#   STATUS    keep, discard or crash; DESC, FOUND, OPEN: text for the row and the journal (log-result)
#   PYTHON    an interpreter that has the packages; without it .venv is built and used
#   BACKEND   cpu or cuda: the build of MLX in .venv on Linux; without it cuda where a GPU answers (prepare)

# Variables that may also stand in the environment, and those that count on make's command line alone: their
# names are common (a desktop exports OPEN), and a text or a switch is meant for one command.
SETTINGS = PYTHON DATASET FILES COLUMN BUDGET TIMEOUT SEED ON_RESULT
GIVEN = BACKEND TAG STATUS DESC FOUND OPEN AGAIN REFERENCE PAIR N WAIT NPROC HOSTS DEVICE TUNE ALL

# $(call pass,NAME,origins that count): as it was typed, a `$` in it too. What does not count is hidden.
define pass
$(if $(filter $2,$(firstword $(origin $1))),override $1 := $$(value $1)
export $1,unexport $1)
endef
$(foreach name,$(SETTINGS),$(eval $(call pass,$(name),command environment)))
$(foreach name,$(GIVEN),$(eval $(call pass,$(name),command)))

# A misspelt name would be a silent default.
typed := $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))
unknown := $(filter-out $(SETTINGS) $(GIVEN) SHELL MAKE%,$(typed))
ifneq "$(strip $(unknown))" ""
$(error make has no variable $(unknown) here; `make help` lists them)
endif

.NOTPARALLEL:
.PHONY: help prepare check bench tune setup baseline run verdict log-result discard results report brief watch holdout test lint clean

help:       ## list the targets
	@scripts/help.sh

prepare:    ## environment, dataset, tokenizer, token cache; nothing where all is there
	@scripts/prepare.sh

check:      ## ask the present train.py's model what a run asks it, without training: leaks, shape, memory
	@scripts/check.sh

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

verdict:    ## again, keep, discard, rerun or judge: all runs of it against all of the last kept program
	@scripts/verdict.sh

log-result: ## log the newest run: make log-result STATUS=keep DESC="…" [FOUND="…" OPEN="…"]
	@scripts/log-result.sh

discard:    ## put the branch back on the last kept commit
	@scripts/discard.sh

results:    ## the table of experiments, the best marked; ALL=1: of every session
	@scripts/results.sh

report:     ## the morning's page, data/report.html, and the picture data/progress.png: [TAG=nov24]
	@scripts/report.sh

brief:      ## where the session stands, in at most 60 lines: for an agent that comes back to it
	@scripts/brief.sh

watch:      ## one screen on the running experiment; leaves the run alone
	@scripts/watch.sh

holdout:    ## the night's gain, measured anew on text that nobody selected on
	@scripts/holdout.sh

test:       ## the tests; ALL=1: the slow ones as well
	@scripts/test.sh

lint:       ## ruff and shellcheck
	@scripts/lint.sh

clean:      ## remove the environment and caches; never results
	@scripts/clean.sh
