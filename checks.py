"""Black-box checks: what a run must satisfy before its val_bpb counts."""


class Refused(Exception):
    """A check failed. The text names the check, and what to look for."""


def shape(logits, expected):
    if tuple(logits.shape) != expected:
        raise Refused(f"shape: logits are {tuple(logits.shape)}, expected {expected}.")


class Examination:
    def __init__(self, model, rows, tokenizer, batch_size):
        pass

    def before(self):
        pass

    def after(self, nats):
        pass


def budget(budget, seconds, step_ends, startup_seconds):
    pass


def data(stream, cache, changed_file):
    pass


def harness(loaded, now):
    pass
