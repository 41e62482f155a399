"""What the README shows to type works as it is written."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_the_graph_in_the_readme_runs_and_answers(capsys):
    code = README.split("```python\n")[1].split("```")[0]
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    assert re.fullmatch(r"\[\{'score': 0\.25\d+, 'checked': True\}\]\n", printed)


def test_every_link_and_make_target_in_the_readme_exists():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z]+)", README):
        assert f"\n{target}:" in makefile, target
