"""A small feature repository with every type of value.

In a module of its own, not in conftest: Feast keeps the source of views on demand and looks for it
by the module's name, of which there is one conftest for each folder.
"""

from datetime import datetime, timedelta
from pathlib import Path

import polars as pl

NOW = datetime(2024, 5, 1, 12)


def every_type() -> pl.DataFrame:
    """Rows of all value types, with nulls, at two moments for most entities."""
    rows = []
    for i in range(40):
        for age_h in (30, 1) if i % 5 else (30,):
            null = i % 4 == 3
            rows.append(
                {
                    "user_id": f"user-{i}",
                    "event_timestamp": NOW - timedelta(hours=age_h, minutes=i),
                    "f32": None if null else i * 1.5 + age_h,
                    "f64": None if i % 7 == 6 else i / 3 + age_h,
                    "i32": None if null else -i - age_h,
                    "i64": None if null else i * 10**15 - 2**53 - age_h,
                    "flag": None if null else i % 2 == 0,
                    "text": None if null else ("é" * 100 if i % 3 == 0 else f"text {i} {age_h}"),
                    "blob": None if null else bytes([i, age_h]),
                    "moment": None if null else NOW - timedelta(days=i, seconds=age_h),
                }
            )
    return pl.DataFrame(
        rows,
        schema_overrides={"f32": pl.Float32, "i32": pl.Int32, "i64": pl.Int64},
    )


def pairs() -> pl.DataFrame:
    """Rows with a key of two columns, one of them a number."""
    return pl.DataFrame(
        [
            {
                "user_id": f"user-{i % 20}",
                "shop": i % 3 - 1,
                "event_timestamp": NOW - timedelta(minutes=i),
                "visits": i,
                "spent": i * 0.25,
            }
            for i in range(60)
        ]
    )


def definitions(folder: Path) -> list:
    from feast import Entity, FeatureService, FeatureView, Field, FileSource, ValueType
    from feast.on_demand_feature_view import on_demand_feature_view
    from feast.types import (
        Bool,
        Bytes,
        Float32,
        Float64,
        Int32,
        Int64,
        String,
        UnixTimestamp,
    )  # fmt: skip

    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)
    shop = Entity(name="shop", join_keys=["shop"], value_type=ValueType.INT64)
    types = FeatureView(
        name="types",
        entities=[user],
        ttl=timedelta(hours=12),
        schema=[
            Field(name="user_id", dtype=String),
            Field(name="f32", dtype=Float32),
            Field(name="f64", dtype=Float64),
            Field(name="i32", dtype=Int32),
            Field(name="i64", dtype=Int64),
            Field(name="flag", dtype=Bool),
            Field(name="text", dtype=String),
            Field(name="blob", dtype=Bytes),
            Field(name="moment", dtype=UnixTimestamp),
        ],
        source=FileSource(
            name="types_source",
            path=str(folder / "types.parquet"), timestamp_field="event_timestamp"
        ),
    )  # fmt: skip
    visits = FeatureView(
        name="visits",
        entities=[user, shop],
        ttl=timedelta(days=2),
        schema=[
            Field(name="user_id", dtype=String),
            Field(name="shop", dtype=Int64),
            Field(name="visits", dtype=Int64),
            Field(name="spent", dtype=Float64),
        ],
        source=FileSource(
            name="visits_source",
            path=str(folder / "visits.parquet"), timestamp_field="event_timestamp"
        ),
    )  # fmt: skip

    @on_demand_feature_view(
        sources=[visits], schema=[Field(name="a_visit", dtype=Float64)], mode="python"
    )
    def worth(inputs):
        pairs = zip(inputs["spent"], inputs["visits"], strict=True)
        return {"a_visit": [s / v if s is not None and v else None for s, v in pairs]}

    return [
        user, shop, types, visits, worth,
        FeatureService(name="all", features=[types, visits, worth]),
        FeatureService(name="types_only", features=[types]),
        FeatureService(name="visits_only", features=[visits[["spent"]], worth]),
    ]  # fmt: skip


def make_repo(folder: Path, online_store: str) -> Path:
    """A repository in `folder`, applied and with everything materialised."""
    from feast import FeatureStore

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "feature_store.yaml").write_text(
        "project: shop\nprovider: local\nregistry: registry.db\n"
        f"online_store: {online_store}\nentity_key_serialization_version: 3\n"
    )
    every_type().write_parquet(folder / "types.parquet")
    pairs().write_parquet(folder / "visits.parquet")
    store = FeatureStore(str(folder))
    store.apply(definitions(folder))
    store.materialize(NOW - timedelta(days=3), NOW)
    return folder
