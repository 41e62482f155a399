"""Batch jobs on a real Ray Data: sinks, dead letters, refusals."""

import numpy as np
import pandas as pd
import pytest
from pydantic import BaseModel, Field

from twinpath import Batch, Graph, Node, Replicas, col
from twinpath.errors import BatchJobError, NodeContractError


class Order(BaseModel):
    amount: float = Field(gt=0)


class Answer(BaseModel):
    tax: float
    bulk: bool


class Tax(Node):
    inputs = {"amount": "float64"}
    outputs = {"tax": "float64"}

    def predict(self, columns):
        if (columns["amount"] == 13).any():
            raise ValueError("thirteen")
        return {"tax": columns["amount"] * 0.2}


class Bulk(Node):
    inputs = {"tax": "float64"}
    outputs = {"tax": "float64", "bulk": "bool"}

    def predict(self, columns):
        return {"tax": columns["tax"] / 2, "bulk": np.ones(len(columns["tax"]), bool)}


class Shrinks(Node):
    outputs = {"tax": "float64", "bulk": "bool"}

    def predict(self, columns):
        return {"tax": columns["amount"][:-1], "bulk": columns["amount"][:-1] > 0}


graph = Graph("orders", input=Order, output=Answer)
with graph as order:
    tax = Tax()(order)
    placed = Bulk().on(replicas=Replicas(1, 2), batch=Batch(max_size=64))
    bulk = placed(tax, where=col("tax") > 10, default={"bulk": False})
    graph.output(tax, bulk)


def source(n: int = 500) -> pd.DataFrame:
    return pd.DataFrame({"amount": np.arange(1.0, n + 1), "id": np.arange(n)})


@pytest.fixture(autouse=True)
def _ray(ray_and_serve):
    return ray_and_serve


@pytest.mark.timeout(300)
def test_every_row_is_in_the_sink_or_in_the_dead_letters_and_never_in_both(tmp_path):
    frame = source()
    frame.loc[7, "amount"] = -1.0
    file = tmp_path / "orders.parquet"
    frame.to_parquet(file)
    job = graph.job(file, tmp_path / "scored", keep=["id"], workers=1, batch_size=100)
    done = job.run()
    scored = pd.read_parquet(tmp_path / "scored").sort_values("id")
    dead = pd.read_parquet(tmp_path / "scored.dead_letters").sort_values("id")
    assert (done.rows, done.dead_letters) == (498, 2) == (len(scored), len(dead))
    assert sorted([*scored["id"], *dead["id"]]) == list(range(500))
    assert dead["error_code"].tolist() == ["invalid_input", "row_failed"]
    assert dead["error_node"].tolist() == [None, "tax"]
    assert dead["amount"].tolist() == [-1.0, 13.0]
    local = graph.run(frame[["amount"]])
    assert scored["tax"].tolist() == local.columns["tax"].tolist()
    assert scored["bulk"].tolist() == local.columns["bulk"].tolist()

    with pytest.raises(BatchJobError, match=r"scored is not empty.*overwrite=True"):
        job.run()


@pytest.mark.timeout(200)
def test_a_node_that_breaks_its_contract_fails_the_job_and_is_named(tmp_path):
    broken = Graph("broken", input=Order, output=Answer)
    with broken as order:
        broken.output(Shrinks()(order))
    with pytest.raises(Exception, match=r"node 'shrinks', column 'tax': expected .* 50 rows"):
        broken.job(source(50), tmp_path / "out", workers=1).run()
    with pytest.raises(NodeContractError):
        broken.run(source(50)[["amount"]])


def test_a_source_without_a_needed_column_is_refused_before_anything_runs(tmp_path):
    frame = source().rename(columns={"amount": "amounts"})
    with pytest.raises(BatchJobError, match=r"no column 'amount'.*Did you mean 'amounts'"):
        graph.job(frame, tmp_path / "out").run()


def test_a_source_that_cannot_be_read_is_refused_by_name(tmp_path):
    with pytest.raises(BatchJobError, match=r"nowhere\.parquet' does not exist"):
        graph.job(tmp_path / "nowhere.parquet", tmp_path / "out").run()
    with pytest.raises(BatchJobError, match="cannot read int"):
        graph.job(7, tmp_path / "out").run()


def test_keeping_a_column_that_the_graph_writes_is_refused(tmp_path):
    with pytest.raises(BatchJobError, match=r"\['tax'\] are also output columns"):
        graph.job(source(), tmp_path / "out", keep=["tax"])


@pytest.mark.timeout(300)
def test_a_resumable_job_gives_the_same_rows_and_a_finished_one_has_nothing_left_to_do(tmp_path):
    frame = source(300)
    frame.loc[7, "amount"] = -1.0
    sink = tmp_path / "scored"

    def job():
        return graph.job(frame, sink, keep=["id"], workers=1, batch_size=40, resume=True)

    done = job().run()
    scored = pd.read_parquet(sink).sort_values("id")
    dead = pd.read_parquet(tmp_path / "scored.dead_letters")
    assert (done.rows, done.dead_letters, done.resumed_rows) == (298, 2, 0)
    assert dead["id"].tolist() == [7, 12]
    local = graph.run(frame[["amount"]])
    assert scored["tax"].tolist() == local.columns["tax"].tolist()
    assert scored["bulk"].tolist() == local.columns["bulk"].tolist()
    assert set(scored.columns) == {"tax", "bulk", "id"}

    again = job().run()
    assert (again.rows, again.dead_letters, again.resumed_rows) == (298, 2, 300)
    with pytest.raises(BatchJobError, match="another source"):
        graph.job(source(299), sink, keep=["id"], resume=True).run()
