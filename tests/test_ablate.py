"""Ablation: each kept change is taken back alone from the best program, and what it carries there is told."""

# A helps, B helps beside A alone, and C had luck with its first seed: with the second it loses as much.
NIGHT = """
import hashlib
from pathlib import Path
from harness import project
A = {}
# one line between two changes, so that each can be
B = {}
# taken back alone
C = {}
# and measured
seed = project.settings()[1]
text = Path(__file__).read_text() + str(seed)
noise = int(hashlib.sha256(text.encode()).hexdigest()[:4], 16) / 2**16 - 0.5
prepare.finish(1.5 - 0.02 * A - 0.03 * (A and B) - 0.002 * C * (42.5 - seed) + 0.001 * noise)
"""


def planted(session):
    for number, (a, b, c) in enumerate([(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1)]):
        session.write_train(NIGHT.format(a, b, c))
        session.script("run", check=0)
        session.make("log-result", "STATUS=keep", f"DESC=change {number}", check=0)
        if number == 2:
            session.make("run", "REFERENCE=1", "N=3", check=0)  # how noisy a run is


def test_a_planted_night_is_taken_apart(session):
    planted(session)
    head = session.git("rev-parse", "HEAD")
    done = session.make("ablate", "N=2", check=0)
    now = {line.split()[0]: line for line in done.stdout.splitlines() if "change" in line}
    gain = {n: float(now[n].split("%")[1].split()[0]) for n in "345" if n in now}
    assert abs(gain["3"] - 0.05) < 0.004 and abs(gain["4"] - 0.03) < 0.004 and abs(gain["5"]) < 0.004
    assert "\n5 carries nothing" in done.stdout and "3 carries nothing" not in done.stdout
    assert session.git("rev-parse", "HEAD") == head and session.git("status", "--short") == ""
    begun = len(session.events)
    again = session.make("ablate", "N=2", check=0)
    assert len(session.events) == begun and again.stdout.splitlines()[-1] in done.stdout  # nothing is run twice
    (commit,) = [line for line in done.stdout.splitlines() if "git checkout" in line]
    session.run("bash", "-c", commit, check=0)  # a program that was run and kept before
    assert "C = 0" in (session.path / "train.py").read_text()
    session.make("log-result", "STATUS=keep", "DESC=without it", check=0)
    assert "without it" in session.make("results", check=0).stdout
