"""The pages under docs/: their code runs, their links and test names lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "docs"], ids=name)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, capsys):
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
        exec(compile(block, str(page), "exec"), names)
    printed = capsys.readouterr().out
    for expected in re.findall(r"^```text\n(.*?)^```", page.read_text(), re.M | re.S):
        assert expected in printed


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_to_a_file(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


WORKS_WITH = (ROOT / "docs" / "works-with.md").read_text()
TESTS = re.findall(r"^(\d+)\. \[`(test_\w+)`\]\(\.\./tests/(\w+\.py)\)$", WORKS_WITH, re.M)


@pytest.mark.parametrize(("number", "test", "file"), TESTS)
def test_every_test_that_backs_a_claim_exists(number, test, file):
    assert f"def {test}(" in (ROOT / "tests" / file).read_text()


def test_every_cell_of_what_works_with_what_names_its_tests():
    cells = [cell for row in re.findall(r"^\| (.*) \|$", WORKS_WITH, re.M) for cell in row.split(" | ")[1:]]
    claims = [cell for cell in cells if cell not in ("-", "in training", "in evaluation, and unwrapped")]
    assert len(claims) > 30
    assert [claim for claim in claims if not re.search(r"\[\d+\]", claim)] == []
    named = set(re.findall(r"\[(\d+)\]\(#tests\)", WORKS_WITH))
    assert named == {number for number, _, _ in TESTS}
