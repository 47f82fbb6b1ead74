"""The arrays that a model holds: compared, put back bit for bit, and shaken.

They are what MLX sees of a module, those under private names too: the leaves of a tree of dictionaries and lists.
"""

from contextlib import contextmanager

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from harness.run_checks import Refused


def copies_of(tree):
    """The tree with arrays of its own, on the same memory: a change of the tree's arrays leaves these as they are."""
    copies = tree_map(lambda value: mx.stop_gradient(value) if isinstance(value, mx.array) else value, tree)
    mx.eval(copies)
    return copies


def refuse_changed(before, model):
    """Refuse a model whose public arrays changed; returns whether private ones did. What is new or gone does not count.

    before: `copies_of` it. Private is what stands under a name that begins with _: no parameter, for MLX either.
    """
    held, now = dict(tree_flatten(before)), dict(tree_flatten(model))
    changed = [path for path in sorted(held.keys() & now) if not same(held[path], now[path])]
    public = [path for path in changed if "._" not in f".{path}"]
    if public:
        raise Refused(
            f"state: {public[0]} changed while the model was evaluated. Update a running statistic in training alone "
            "(if self.training), put the weights of an average or an ensemble in place before run.finish, or call each "
            "member with its own. What is kept for inspection alone belongs under a name that begins with _."
        )
    return bool(changed)


def same(old, new):
    """Whether an array is as it was. What is none does not count."""
    arrays = isinstance(old, mx.array) and isinstance(new, mx.array)
    return not arrays or (old.dtype == new.dtype and mx.array_equal(old, new, equal_nan=True).item())


@contextmanager
def kept(tree):
    """Within it arrays may change: afterwards all are as before, random numbers too. Yields a copy of what it holds."""
    before, key = copies_of(tree), mx.random.state[0].tolist()
    try:
        yield before
    finally:
        put_in(tree, before)
        mx.random.seed(key[0] << 32 | key[1])


def put_in(tree, values):
    """The leaves of `values` in place of those of `tree`, as far as it still has them."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values[: len(tree)]):
        if isinstance(value, (dict, list, tuple)):
            held = tree.get(key) if isinstance(tree, dict) else tree[key]
            if isinstance(held, type(value)):
                put_in(held, value)
        elif not isinstance(tree, tuple):  # MLX trains nothing that one holds
            tree[key] = value


def shake(model):
    """Fill in what is weak: parameters near zero hide behind them what a trained model would use."""
    model.update(tree_map(shaken, model.parameters()))
    mx.eval(model)


def shaken(array):
    """An array with noise: a matrix is filled up to 1 / sqrt(its smaller side), a vector or a number to a tenth.

    What is strong stays as it was built, so that nothing is driven out of the range that it was made for; what is of
    one sign keeps that.
    """
    if not array.size or not mx.issubdtype(array.dtype, mx.floating):
        return array
    values = array.astype(mx.float32)
    missing = (min(array.shape[-2:]) ** -0.5 if array.ndim > 1 else 0.1) - mx.sqrt(mx.mean(values**2)).item()
    if not missing > 0:  # strong, or not finite
        return array
    noise, lowest, highest = missing * mx.random.normal(array.shape), values.min().item(), values.max().item()
    noise = mx.abs(noise) if lowest > 0 else -mx.abs(noise) if highest < 0 else noise
    return (values + noise).astype(array.dtype)
