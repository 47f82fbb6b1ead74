# Every command that a person or an agent types; the work is in scripts/, one helper a verb
# (`scripts/run.sh --help` tells more). GNU Make 3.81 reads this file.
# Variables are given as NAME=value after the target; README.md has a table of them.

# Variables that may also stand in the environment, and those that count on make's command line alone: their
# names are common (a desktop exports OPEN), and a text or a switch is meant for one command.
SETTINGS = PYTHON DATASET FILES COLUMN BUDGET TIMEOUT SEED ON_RESULT
GIVEN = BACKEND TAG STATUS DESC FOUND OPEN AGAIN REFERENCE PAIR N WAIT NPROC HOSTS DEVICE TUNE ALL PROMPT SCRIPT

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
$(error make has no variable $(unknown) here; README.md lists them)
endif

.NOTPARALLEL:
VERBS = help prepare check bench tune setup baseline run verdict log-result discard results report brief watch holdout ablate sample test lint clean
.PHONY: $(VERBS)
$(VERBS):
	@scripts/$@.sh

help:       ## list the targets
prepare:    ## environment, dataset, tokenizer, token cache; nothing where all is there
check:      ## ask the present train.py's model what a run asks it, without training: leaks, shape, memory
bench:      ## time the parts of a step of the present train.py; SCRIPT=probe.py: your own script, as fast as a run
tune:       ## fit depth, step and batch size in train.py to this machine and BUDGET
setup:      ## open a session: make setup TAG=nov24 [DATASET=climbmix]
baseline:   ## prepare, run train.py as it is, log it as the baseline
run:        ## one experiment of the committed train.py
verdict:    ## again, keep, discard, rerun or judge: all runs of it against all of the last kept program
log-result: ## log the newest run: make log-result STATUS=keep DESC="…" [FOUND="…" OPEN="…"]
discard:    ## put the branch back on the last kept commit
results:    ## the table of experiments, the best marked; ALL=1: of every session
report:     ## the morning's page, data/report.html, and the picture data/progress.png: [TAG=nov24]
brief:      ## where the session stands, in at most 60 lines: for an agent that comes back to it
watch:      ## one screen on the running experiment; leaves the run alone
holdout:    ## the night's gain, measured anew on text that nobody selected on
ablate:     ## what each kept change is still worth: taken back alone from the best program
sample:     ## a few lines of text from the best weights: [PROMPT="Once upon"]
test:       ## the tests; ALL=1: the slow ones as well
lint:       ## ruff and shellcheck
clean:      ## remove the environment and caches; never results
