"""Pictures of graphs."""

import xml.etree.ElementTree as ET

import pytest
from pydantic import BaseModel

from twinpath import Graph, Node, Replicas, col
from twinpath.errors import ConfigError
from twinpath.graph.layout import lay_out


class In(BaseModel):
    x: float
    label: str


class Out(BaseModel):
    y: float


class Score(Node):
    outputs = {"y": "float64"}


def drawing():
    g = Graph("g", input=In, output=Out)
    with g as rows:
        first = Score()(rows, name="first")
        rest = g.exit(first, where=col("y") > 0.9)
        gpu = Score().on(num_gpus=1, replicas=Replicas(0, 4))(rest, name="gpu")
        g.output(Score()(gpu, where=col("label") == '<a & "b">', name="branch"))
    return g


def test_mermaid_has_nodes_conditions_stages_and_exits():
    text = drawing().draw().mermaid
    assert text.startswith("flowchart TD\n")
    assert 'subgraph stage1["stage 2: 1 GPU · 0–4 replicas"]' in text
    assert 'n0["first<br/>Score"]:::fused' in text
    assert '|"y #gt; 0.9"| output' in text
    assert ":::exit" in text
    assert "label == '#lt;a #amp; #quot;b#quot;#gt;'" in text


def test_the_picture_is_wellformed_and_escaped():
    svg = drawing().draw().svg
    root = ET.fromstring(svg)
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"first", "gpu", "branch", "1 GPU · 0–4 replicas", "early exit"} <= texts
    assert "label == '<a & \"b\">'" in texts


def test_boxes_of_the_picture_do_not_overlap():
    widths = dict.fromkeys("abcdefg", 100.0)
    edges = {("a", "b"): 0, ("a", "c"): 0, ("a", "d"): 150, ("b", "e"): 0, ("c", "e"): 0}
    edges |= {("d", "g"): 0, ("e", "f"): 0, ("f", "g"): 0, ("a", "g"): 150}
    layout = lay_out(widths, edges, "g")
    for (source, target), _ in edges.items():
        assert layout.layer[source] < layout.layer[target]
    for one in widths:
        for other in widths:
            if one < other and layout.layer[one] == layout.layer[other]:
                assert abs(layout.x[one] - layout.x[other]) >= 100


def test_a_drawing_is_saved_by_its_suffix(tmp_path):
    g = drawing()
    assert g.draw().save(tmp_path / "g.svg").read_text().startswith("<svg")
    assert g.draw().save(tmp_path / "g.mmd").read_text().startswith("flowchart")
    with pytest.raises(ConfigError, match=r"\.svg or \.mmd"):
        g.draw().save(tmp_path / "g.png")


def test_a_notebook_shows_the_graph():
    assert "<svg" in drawing()._repr_html_()
    assert drawing().draw()._repr_svg_().startswith("<svg")
