"""Open a session, for scripts/setup.sh. Prints its dataset, whether that is prepared, and the commit it starts from."""

import json
import os

import prepare
from harness import files, project
from scripts import settings
from scripts.run import launch
from scripts.session import HEADER, Refused, Session, commit_with, on_dataset, options, run_command


def main(args):
    given = settings.in_force({})
    os.environ |= {settings.TO_PYTHON.get(name, name): text for name, text in given.items()}
    dataset = prepare.get_dataset(args.dataset or project.dataset_of_train())  # an unknown name ends here
    if given["HOSTS"]:
        launch.hostfile()  # refused where it cannot be one
    session = Session(args.tag)
    if session.tag.lower() in ("none", "detached") or session.attempts():
        raise Refused(f"TAG={session.tag} is the name of other runs: choose another one")
    with files.one_at_a_time(project.STORE):
        files.write_atomically(session.folder / "settings.json", json.dumps(given) + "\n")
        if not session.table.exists():
            files.write_atomically(session.table, HEADER + "\n")
        session.link()
    text = on_dataset((project.ROOT / "train.py").read_bytes().decode("utf-8", "replace"), dataset.name)
    start, _ = commit_with(text, args.head, args.tag, "start", f"Session {args.tag}: train on {dataset.name}")
    print(dataset.name, prepare.is_prepared(dataset), start)


if __name__ == "__main__":
    run_command(main, options(__doc__, head="", dataset="").parse_args())
