"""The command line, without Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import twinpath
from twinpath.cli import app
from twinpath.online.environment import FAST_PATH

MODULE = """
from pydantic import BaseModel
from twinpath import Graph, Node
class In(BaseModel):
    x: float
    dead: str = ""
class Out(BaseModel):
    y: float
class Double(Node):
    inputs = {"x": "float64"}
    outputs = {"y": "float64"}
    def predict(self, columns):
        return {"y": columns["x"] * 2}
graph = Graph("doubling", input=In, output=Out)
with graph as rows:
    graph.output(Double().on(num_cpus=2)(rows))
number = 3
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    package = tmp_path / "cli_demo"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "doubling.py").write_text(MODULE)
    (package / "broken.py").write_text("import not_a_module_of_anyone")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield lambda *words: CliRunner().invoke(app, words, env={"COLUMNS": "160"})
    for name in [name for name in sys.modules if name.startswith("cli_demo")]:
        del sys.modules[name]


def test_explain_prints_stages_crossings_and_dead_columns(run):
    result = run("explain", "cli_demo.doubling:graph")
    assert result.exit_code == 0
    for text in ("doubling", "Serve deployment 'double' (2 CPU)", "sends", "dead"):
        assert text in result.stdout


def test_explain_prints_json(run):
    found = json.loads(run("explain", "cli_demo.doubling", "--json").stdout)
    assert found["crossings"][0]["sends"] == ["x"]
    assert found["dead_inputs"] == ["dead"]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("cli_demo.doubling:grahp", "Did you mean 'graph'?"),
        ("cli_demo.doubling:number", "is a int, not a Graph"),
        ("cli_demo.dubling:graph", "Did you mean 'doubling'?"),
        ("cli_dem:graph", "Did you mean 'cli_demo'?"),
        ("cli_demo.broken:graph", "not_a_module_of_anyone"),
        ("graphs/flights.py", "expected package.module:name"),
        (":graph", "expected package.module:name"),
    ],
)
def test_a_path_that_is_no_graph_says_why(run, path, says):
    result = run("explain", path)
    assert result.exit_code == 2
    assert says in result.stderr.replace("\n", " ")


def test_draw_writes_a_file(run, tmp_path):
    target = tmp_path / "picture.svg"
    assert run("draw", "cli_demo.doubling:graph", "-o", str(target)).exit_code == 0
    assert target.read_text().startswith("<svg")
    assert run("draw", "cli_demo.doubling:graph", "-o", "picture.gif").exit_code == 2


def test_the_environment_of_the_fast_path_can_be_read_by_a_shell(run):
    script = f'eval "$(cat <<"end"\n{run("env").stdout}end\n)"; env -0'
    shell = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=30)
    assert set(shell.stdout.split("\0")) >= {f"{k}={v}" for k, v in FAST_PATH.items()}


def test_version_is_printed(run):
    assert run("version").stdout.strip() == twinpath.__version__


def test_the_command_line_starts_without_ray():
    code = (
        "import sys, twinpath.cli; sys.exit(bool({'ray', 'pandas', 'mlflow'} & set(sys.modules)))"
    )
    library = str(Path(twinpath.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": library}, timeout=60
    )
    assert done.returncode == 0


def test_keys_are_made_listed_and_revoked(tmp_path: Path):
    from twinpath.online.gateway.keys import ApiKeys, read_keys

    runner, file = CliRunner(), tmp_path / "keys"
    made = runner.invoke(app, ["keys", "new", str(file), "--principal", "ann", "--graph", "a"])
    key = made.stdout.strip()
    assert ApiKeys(file).principal(key.encode()).name == "ann"
    runner.invoke(app, ["keys", "new", str(file), "--principal", "ben", "--days", "1"])
    listed = runner.invoke(app, ["keys", "list", str(file)]).stdout
    assert "ann" in listed
    assert "ben" in listed
    assert key not in listed
    first = read_keys(file)[0].id
    assert runner.invoke(app, ["keys", "revoke", str(file), first]).exit_code == 0
    assert [record.principal for record in read_keys(file)] == ["ben"]
    wrong = runner.invoke(app, ["keys", "revoke", str(file), first])
    assert "no key" in str(wrong.exception)
    bad = runner.invoke(app, ["keys", "new", str(file), "--principal", "x", "--priority", "top"])
    assert bad.exit_code == 2
