"""The table of features in ``docs/reference/engines.md`` follows from the tests that ``engine_features`` names.

``python tests/unit/test_features.py`` writes the table.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from engine_features import FEATURES, OVERFILL_REFUSES, VLLM_REFUSES, Feature  # noqa: E402

PAGE = ROOT / "docs" / "reference" / "engines.md"
TABLE = re.compile(r"(?<=<!-- features -->\n).*?(?=<!-- /features -->)", re.DOTALL)
MIXED_STACK = r"engines\('(overfill', 'vllm|vllm', 'overfill)'\)"
MOCK_TESTS = ROOT / "tests" / "unit" / "engine" / "test_mock_conformance.py"
LEFT_OUT = re.compile(r"^    (test_\w+) = None", re.MULTILINE)
SUITE = sorted((ROOT / "tests" / "support").glob("*_conformance.py"))


def names_of_tests(*files: Path) -> set[str]:
    return {name for file in files for name in re.findall(r"def (test_\w+)\(", file.read_text(encoding="utf-8"))}


def mixed_tests() -> set[str]:
    """Tests with vLLM that have the fixture ``mixed``, or start a stack with one stage on each engine."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in (ROOT / "tests" / "vllm").glob("*.py")]
    tests = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {
        test.name
        for test in tests
        if "mixed" in [argument.arg for argument in test.args.args] or re.search(MIXED_STACK, ast.unparse(test))
    }


def cells(feature: Feature) -> list[str]:
    """The row's cells for OverFill's engine, vLLM, the mock engine and mixed stacks."""
    suite = bool(feature.both)
    left_out = set(LEFT_OUT.findall(MOCK_TESTS.read_text(encoding="utf-8")))
    on_mock = suite and not feature.computed and not left_out & {*feature.both}
    works = [suite or bool(feature.overfill), suite or bool(feature.vllm), on_mock or bool(feature.mock)]
    works.append(bool(feature.mixed))
    return ["yes" if one else "" for one in works]


def table() -> str:
    rows = [f"| {each.text} | {' | '.join(cells(each))} |" for each in FEATURES]
    rows += [
        f"| {each.text} | yes | refused: \u201c{each.words}\u201d | | |" for each in VLLM_REFUSES if each.other_works
    ]
    rows += [
        f"| {each.text} | refused: \u201c{each.words}\u201d | yes | | |"
        for each in OVERFILL_REFUSES
        if each.other_works
    ]
    rows += [
        f"| {each.text} | no | refused: \u201c{each.words}\u201d | | |" for each in VLLM_REFUSES if not each.other_works
    ]
    head = "| feature | `overfill` | `vllm` | `mock` | mixed |\n|---|---|---|---|---|\n"
    return f"{head}{chr(10).join(rows)}\n"


def test_every_feature_has_tests_that_exist() -> None:
    suite, on_vllm = names_of_tests(*SUITE), names_of_tests(*(ROOT / "tests" / "vllm").glob("*.py"))
    mixed = mixed_tests()
    own = names_of_tests(*(ROOT / "tests" / "integration").glob("*.py"), *(ROOT / "tests" / "unit").rglob("*.py"))
    for feature in FEATURES:
        assert set(feature.both) <= suite, feature.text
        assert {*feature.overfill, *feature.mock} <= own, feature.text
        assert set(feature.vllm) <= on_vllm, feature.text
        assert set(feature.mixed) <= mixed, feature.text
        assert feature.both or feature.overfill or feature.vllm, feature.text


def test_the_page_has_the_table() -> None:
    found = TABLE.search(PAGE.read_text(encoding="utf-8"))
    assert found is not None
    assert found.group(0) == table(), "run `make tables`"


if __name__ == "__main__":
    PAGE.write_text(TABLE.sub(lambda _: table(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
