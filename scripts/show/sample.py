"""Show a few lines of text from the session's best weights, by their own program; the report shows them, too."""

import subprocess
import sys

from harness import project
from harness.files import printable
from scripts.judge.log_result import program_of_weights
from scripts.run import experiment
from scripts.session import Refused, Session, git, options, run_command


def main(args):
    this_session = Session(args.tag)
    own = this_session.folder / project.BEST_WEIGHTS.name
    weights = own if own.exists() else project.BEST_WEIGHTS  # of a session from before
    held = experiment.begin(this_session)
    blob = program_of_weights(weights)
    row = next((row for row in reversed(this_session.rows()[0]) if blob and row.blob == blob), None)
    if row is None:
        raise Refused("there are no weights of a kept program here: make baseline, or make run and keep what helps")
    with experiment.checked_out(row.commit if git("rev-parse", "HEAD") else None) as folder:
        command = [sys.executable, "train.py", "--sample", str(weights), args.prompt]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, errors="replace")
    del held
    if done.returncode:
        raise Refused("train.py could not sample from these weights (see above)")
    text = done.stdout.partition("\nsample:\n")[2].strip()
    this_session.note("sample", commit=row.commit, bpb=row.bpb, prompt=args.prompt, text=text)
    print(f"{row.commit}, val_bpb {row.bpb:.4f}, goes on from {args.prompt!r}:\n")
    print("\n".join(map(printable, text.split("\n"))))


if __name__ == "__main__":
    run_command(main, options(__doc__, prompt="").parse_args())
