"""What a model holds: every array of it, put back bit for bit after whatever it was asked, and shaken."""

import functools
import types
from contextlib import contextmanager, suppress

import mlx.core
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

mx = types.SimpleNamespace(**vars(mlx.core))  # the harness's own: its functions as they are now, whoever replaces one


class Refused(Exception):
    """A check failed. The text names the check, and what to look for."""


CHANGED = (
    "parameters: {} is not what it was before the evaluation. Look for an update, a running statistic or a buffer that "
    "the model changes when it is called: it must not learn from these rows, nor do in a call what belongs into the "
    "budget."
)
PLAIN = str, bytes, int, float, complex, bool, type(None), type, types.ModuleType, types.BuiltinFunctionType, np.ndarray


def arrays_of(model):
    """({path: array}, paths of parameters) of every MLX array that a callable holds.

    Followed are modules, attributes, containers, partial functions, bound methods, and what a function encloses
    or names. A path may hold another array after a call: what is watched is the content.
    """
    found, parameters, seen, left = {}, set(), {}, [("", model, False)]
    while left and len(seen) < 100_000:
        path, value, module = left.pop()
        if isinstance(value, mx.array):
            found[path.strip(".")] = value
            if module:
                parameters.add(path.strip("."))
            continue
        if isinstance(value, PLAIN) or id(value) in seen:
            continue
        seen[id(value)] = value  # kept, so that its id stays its own
        inner = {}
        if isinstance(value, dict):
            inner = dict(value)
        elif isinstance(value, (list, tuple, set)):
            inner = dict(enumerate(value))
        elif isinstance(value, functools.partial):
            inner = {"func": value.func, "args": value.args, "keywords": value.keywords}
        elif isinstance(value, types.MethodType):
            inner = {"": value.__self__, value.__func__.__name__: value.__func__}
        elif not isinstance(value, types.FunctionType):
            call = vars(type(value)).get("__call__")  # what it names may hold more
            inner |= {"__call__": call} if isinstance(call, types.FunctionType) else {}
        else:
            for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
                with suppress(ValueError):  # nothing in it yet
                    inner[name] = cell.cell_contents
            names = set(value.__code__.co_names) & value.__globals__.keys()
            inner |= {name: value.__globals__[name] for name in sorted(names)}
            inner["defaults"] = value.__defaults__
        is_module = isinstance(value, nn.Module)
        for key, part in [*inner.items(), *getattr(value, "__dict__", {}).items()]:
            inside = is_module or (module and isinstance(value, (dict, list, tuple)))
            left.append((f"{path}.{key}", part, inside and not str(key).startswith("_")))
    if not isinstance(model, nn.Module) and callable(getattr(model, "parameters", None)):
        own = {f"parameters.{name}": array for name, array in tree_flatten(model.parameters())}
        found, parameters = found | own, parameters | set(own)
    return found, parameters


def same(old, new):
    """Whether an array is there still (new may be None), and holds what it held."""
    alike = new is not None and (old.dtype, old.shape) == (new.dtype, new.shape)
    return alike and mx.array_equal(old, new, equal_nan=True).item()


def copies_of(tree):
    """The tree with arrays of its own, on the same memory: a change of the tree's arrays leaves these as they are."""
    copies = tree_map(lambda value: mx.stop_gradient(value) if isinstance(value, mx.array) else value, tree)
    mx.eval(copies)
    return copies


@contextmanager
def put_back(model):
    """Within it weights may be shaken: afterwards all that the model holds is as before, bit for bit.

    Yields [(array, a copy of it as it was)] of a module's parameters, or of all that another callable holds. Puts
    MLX's random numbers back as well. Raises `Refused` where the model itself changed what it holds.
    """
    held, parameters = arrays_of(model)
    key = mx.random.state[0].tolist()
    copies = copies_of(held)
    wanted = parameters if isinstance(model, nn.Module) else held
    chosen = {id(held[path]): (held[path], copies[path]) for path in wanted}
    try:
        yield list(chosen.values())
    finally:
        restore([(array, copies[path]) for path, array in held.items()])
        mx.random.seed(key[0] << 32 | key[1])
    after = arrays_of(model)[0]
    changed = [path for path in held if path in parameters and not same(copies[path], after.get(path))]
    if changed:
        raise Refused(CHANGED.format(changed[0]))


@contextmanager
def kept(tree):
    """Within it the arrays of a tree of dictionaries and lists may be replaced: afterwards all are as before."""
    before = copies_of(tree)
    try:
        yield
    finally:
        put_in(tree, before)


def put_in(tree, values):
    """The leaves of `values`, a tree of the same form, in place of those of `tree`; what it has besides goes."""
    for key in set(tree) - set(values) if isinstance(tree, dict) else ():
        del tree[key]
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, (dict, list, tuple)):
            put_in(tree[key], value)
        else:
            tree[key] = value


def restore(pairs):
    """pairs: (array, what it held). In place, so that whoever holds the array sees it."""
    for array, old in pairs:
        array[...] = old
    mx.eval([array for array, _ in pairs])


def shake(pairs):
    """Fill in what is weak: arrays near zero hide behind them what a trained model would use.

    pairs: (array, what it held). A matrix is filled up to 1 / sqrt(its smaller side), a vector or a number to a
    tenth. What is strong stays as it was built, so that nothing is driven out of the range that it was made for;
    what is of one sign keeps that. Returns whether anything was changed.
    """
    filled = False
    for array, old in pairs:
        if not array.size or not mx.issubdtype(array.dtype, mx.floating):
            continue
        values = old.astype(mx.float32)
        missing = (min(array.shape[-2:]) ** -0.5 if array.ndim > 1 else 0.1) - mx.sqrt(mx.mean(values**2)).item()
        if missing > 0:  # not where it is not finite
            noise = missing * mx.random.normal(array.shape)
            lowest, highest = values.min().item(), values.max().item()
            noise = mx.abs(noise) if lowest > 0 else -mx.abs(noise) if highest < 0 else noise
            array[...], filled = (values + noise).astype(array.dtype), True
    mx.eval([array for array, _ in pairs])
    return filled
