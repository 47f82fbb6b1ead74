"""Fast forms: another way to compute a function of train.py, used only while that function is as it was."""

import ast
import hashlib
import inspect
import sys
from functools import cache, wraps
from pathlib import Path

# Of each fast form, by its name: `source_hash` of the function that it computes.
MADE_FOR = {
    "relu_squared": "01d356db", "loss_and_gradients": "1a826880", "embed": "a3323e7f", "mix": "78921afa",
    "heads": "10a735d1", "adagrad": "6cff6518", "add_gated": "2b72986d", "gated_norm": "b0d6fd63",
}  # fmt: skip


def fast(form, when=True):
    """Decorator: run `form` in place of the plain function below, unless that was edited since `form` was made.

    The constants of train.py that `form` needs are its keyword-only arguments, by the same names. After an edit of the
    function, or of one that it calls in the same file, the plain function runs, and stderr says so once.
    when: whether this machine has the fast form.
    """
    constants = [p.name for p in inspect.signature(form).parameters.values() if p.kind is p.KEYWORD_ONLY]

    def decorate(plain):
        functions_of(plain.__code__.co_filename)  # now, while the file is what was imported

        @cache
        def same():  # asked at the first call, when all that the file defines is there
            if source_hash(plain) == MADE_FOR[form.__name__]:
                return True
            words = "or what it calls, was edited: it runs as it is written, without its fast form"
            print(f"note: {plain.__name__}, {words}", file=sys.stderr)
            return False

        @wraps(plain)
        def chosen(*arguments, **named):
            if not same():
                return plain(*arguments, **named)
            return form(*arguments, **named, **{name: plain.__globals__[name] for name in constants})

        return chosen

    return decorate if when else lambda plain: plain


@cache
def functions_of(path):
    """{name: syntax tree} of a Python file's functions when this is first asked, without decorators and docstrings."""
    functions = [node for node in ast.parse(Path(path).read_text("utf-8")).body if isinstance(node, ast.FunctionDef)]
    for node in functions:
        node.decorator_list = []
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return {node.name: node for node in functions}


def source_hash(function):
    """Eight hex digits of what a function computes: its text and that of all that it calls in its own file.

    Layout, comments, docstrings and values of constants make no difference. A called name that is no longer a
    function of the file does.
    """
    trees, names = functions_of(function.__code__.co_filename), function.__globals__
    texts, left = set(), [function]
    while left:
        called = inspect.unwrap(left.pop())
        tree = trees.get(called.__name__) if getattr(called, "__globals__", None) is names else None
        text = ast.unparse(tree) if tree else repr(type(called))
        if text not in texts:
            texts.add(text)
            inside = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} if tree else ()
            left += [names[name] for name in inside if callable(names.get(name))]
    return hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()[:8]
