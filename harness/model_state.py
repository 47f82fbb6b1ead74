"""The arrays that a model holds: compared, put back bit for bit, and shaken."""

import inspect
import types
from contextlib import contextmanager, suppress

import mlx.core as mx
from mlx.utils import tree_map

from harness.run_checks import Refused

# --- what it holds -----------------------------------------------------------------------------------


def arrays_of(model):
    """{path: array} of every MLX array that a callable holds.

    Followed are attributes, lists, dictionaries, bound methods, and what a function encloses or names. A path may hold
    another array after a call: what counts is the content.
    """
    found, seen, left = {}, {}, [("model", model)]
    while left:
        path, value = left.pop()
        if isinstance(value, mx.array):
            found[path] = value
        elif id(value) not in seen:
            seen[id(value)] = value  # kept, so that no other object gets its id
            left += [(f"{path}.{key}", part) for key, part in parts_of(value).items()]
    return found


def parts_of(value):
    """{name: what a value is made of}; of modules, classes and plain values nothing."""
    if isinstance(value, (type, types.ModuleType)):
        return {}
    if isinstance(value, types.MethodType):
        return {"self": value.__self__}
    parts = dict(value) if isinstance(value, dict) else {}
    if isinstance(value, (list, tuple)):
        parts = dict(enumerate(value))
    if isinstance(value, types.FunctionType):
        with suppress(ValueError):  # where something that it encloses has no value yet
            names = inspect.getclosurevars(value)
            parts = {**names.globals, **names.nonlocals}
    return parts | getattr(value, "__dict__", {})


PRIVATE = "._"  # in a path: what a model keeps under such a name is no parameter, for MLX either


def refuse_changed(before, model):
    """Refuse a model whose public arrays changed; returns whether private ones did. What is new or gone does not count.

    before: copies of what `arrays_of` told.
    """
    now, paths = arrays_of(model), []
    for path in sorted(before.keys() & now):
        old, new = before[path], now[path]
        if old.dtype != new.dtype or not mx.array_equal(old, new, equal_nan=True).item():
            paths.append(path)
    if public := next(filter(lambda path: PRIVATE not in path, paths), None):
        raise Refused(
            f"state: {public} changed while the model was evaluated. Update a running statistic in training alone (if "
            "self.training), put the weights of an average or an ensemble in place before run.finish, or call each "
            "member with its own. What is kept for inspection alone belongs under a name that begins with _."
        )
    return bool(paths)


# --- put back ----------------------------------------------------------------------------------------


def copies_of(tree):
    """The tree with arrays of its own, on the same memory: a change of the tree's arrays leaves these as they are."""
    copies = tree_map(lambda value: mx.stop_gradient(value) if isinstance(value, mx.array) else value, tree)
    mx.eval(copies)
    return copies


@contextmanager
def kept(tree):
    """Within it the arrays of a tree of dictionaries and lists may be replaced: afterwards all are as before."""
    before = copies_of(tree)
    try:
        yield
    finally:
        put_in(tree, before)


def put_in(tree, values):
    """The leaves of `values`, a tree of the same form, in place of those of `tree`."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, (dict, list, tuple)):
            put_in(tree[key], value)
        else:
            tree[key] = value


@contextmanager
def put_back(model):
    """Within it weights may be shaken: afterwards all that the model holds is as before, and MLX's random numbers.

    Yields [(array, a copy of it)] of what is public. Raises `Refused` where the model itself changed what it holds.
    """
    held, key = arrays_of(model), mx.random.state[0].tolist()
    copies = copies_of(held)
    try:
        yield [(held[path], copies[path]) for path in held if PRIVATE not in path]
    finally:
        restore([(array, copies[path]) for path, array in held.items()])
        mx.random.seed(key[0] << 32 | key[1])
    refuse_changed(copies, model)


def restore(pairs):
    """pairs: (array, what it held). In place, so that whoever holds the array sees it."""
    for array, old in pairs:
        array[...] = old
    mx.eval([array for array, _ in pairs])


def shake(pairs):
    """Fill in what is weak: arrays near zero hide behind them what a trained model would use.

    pairs: (array, what it held). A matrix is filled up to 1 / sqrt(its smaller side), a vector or a number to a
    tenth. What is strong stays as it was built, so that nothing is driven out of the range that it was made for;
    what is of one sign keeps that.
    """
    for array, old in pairs:
        if not array.size or not mx.issubdtype(array.dtype, mx.floating):
            continue
        values = old.astype(mx.float32)
        missing = (min(array.shape[-2:]) ** -0.5 if array.ndim > 1 else 0.1) - mx.sqrt(mx.mean(values**2)).item()
        if missing > 0:  # not where it is not finite
            noise = missing * mx.random.normal(array.shape)
            lowest, highest = values.min().item(), values.max().item()
            noise = mx.abs(noise) if lowest > 0 else -mx.abs(noise) if highest < 0 else noise
            array[...] = (values + noise).astype(array.dtype)
    mx.eval([array for array, _ in pairs])
