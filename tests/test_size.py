"""The product stays small enough for one person to hold. Lines are not won by longer ones: ruff ends them at 120."""

import subprocess

from conftest import ROOT

MOST, MOST_OF_A_FILE = 7500, 500  # lines; the first number only falls
MOST_OF_TESTS = 9999


def test_the_product_is_no_longer_than_its_cap():
    listed = ["git", "ls-files", "Makefile", "*.py", "*.sh", "*.j2", ".ci"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    lines = {name: (ROOT / name).read_text().count("\n") for name in names}
    product = {name: count for name, count in lines.items() if not name.startswith("tests/")}
    assert sum(lines.values()) - sum(product.values()) <= MOST_OF_TESTS
    assert {name for name, lines in product.items() if lines > MOST_OF_A_FILE} == set()
    assert len(product) > 50 and sum(product.values()) <= MOST
