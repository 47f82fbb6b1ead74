"""The fixed harness, as train.py sees it; and the command that makes a dataset ready.

Nothing behind it changes during a session, so that every experiment is measured the same way.

    python prepare.py [--dataset NAME]     fetch, train the tokenizer, write the token cache

train.py uses, in this order: `Run(dataset)`, `run.batches(…)`, `run.warm_up(…)`, `run.rehearse(…)`,
`run.start_clock()`, `run.training()`, `run.progress()` and `run.log_step(…)` in its loop, and `run.finish(…)`, which
evaluates and leaves data/last_run.json. The run is in harness/run.py, the metric in harness/evaluation.py, what makes
a run invalid in harness/leak_checks.py and harness/run_checks.py.
"""

import argparse

from data_sources import DATASETS, get_dataset
from harness.batches import Batches, evaluation_rows
from harness.evaluation import compute_streams, evaluate_bpb, score_rows
from harness.project import dataset_of_train
from harness.run import Run
from harness.token_cache import TokenCache, Tokenizer, is_prepared, prepare


def main():
    parser = argparse.ArgumentParser(description="Fetch a dataset, train its tokenizer, write its token cache.")
    parser.add_argument("--dataset", metavar="NAME", help=f"{', '.join(DATASETS)} (default: train.py's)")
    prepare(get_dataset(parser.parse_args().dataset or dataset_of_train()))


if __name__ == "__main__":
    main()
