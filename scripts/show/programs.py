"""Programs as text: the parts that they are made of, and how two of them differ."""

import difflib
import re
from collections import Counter

PART = re.compile(r"(?:def|class) (\w+)|([A-Z][A-Z0-9_]*) *(?::[^=]*)?=|    def (\w+)")


def parts_of(text):
    """For each line the part of the program that it stands in: a constant, a function, `Class.method`; None above."""
    found, inside, name = [], "", None
    for line in text.split("\n"):
        if match := PART.match(line):
            top, constant, method = match.groups()
            inside = top or inside if not constant else ""
            name = constant or top or (f"{inside}.{method}" if inside else method)
        found.append(name)
    return found


def change(old, new):
    """(lines added, lines removed, parts that changed, the most lines first): from one program to another."""
    sides = [(text.split("\n"), parts_of(text)) for text in (old, new)]
    count, weight = [0, 0], Counter()
    for what, *where in difflib.SequenceMatcher(None, sides[0][0], sides[1][0]).get_opcodes():
        for side, (start, end) in enumerate((where[:2], where[2:])):
            if what != "equal":
                lines, parts = sides[side]
                count[side] += end - start
                code = (i for i in range(start, end) if lines[i].strip() and not lines[i].lstrip().startswith("#"))
                weight.update(parts[i] or "imports" for i in code)
    return count[1], count[0], [part for part, _ in weight.most_common()]


def diff(old, new):
    """The lines of a unified diff between two programs, without its two head lines; each hunk names its part."""
    a, parts, found = old.split("\n"), parts_of(old), []
    for line in list(difflib.unified_diff(a, new.split("\n"), lineterm=""))[2:]:
        if hunk := re.match(r"@@ -(\d+).*@@", line):
            at = min(int(hunk[1]) + 3, len(parts)) - 1  # where its first change is
            line += f" {parts[at] or ''}"
        found.append(line)
    return found
