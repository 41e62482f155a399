"""The feature definitions of the flights example, as Feast knows them.

Views are those of graphs.flights_model.features, which also makes their tables: a name, a type or a
time to live is written once.
"""

from feast import Entity, FeatureService, FeatureView, Field, FileSource, ValueType
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Float32, Float64, String

from graphs.flights_model.features import SERVICE, TREND, VIEWS

entities = {
    key: Entity(name=key, join_keys=[key], value_type=ValueType.STRING)
    for key in dict.fromkeys(view.key for view in VIEWS)
}
sources = {
    view.name: FileSource(
        name=f"{view.name}_history",
        path=f"../features/{view.name}.parquet",
        timestamp_field="known_at",
    )
    for view in VIEWS
}
views = {
    view.name: FeatureView(
        name=view.name,
        entities=[entities[view.key]],
        ttl=view.ttl,
        schema=[
            Field(name=view.key, dtype=String),
            *(Field(name=value, dtype=Float32) for value in view.values),
        ],
        source=sources[view.name],
    )
    for view in VIEWS
}


@on_demand_feature_view(
    name="trends",
    sources=[views["origin"]],
    schema=[Field(name=TREND, dtype=Float64)],
    mode="python",
)
def trends(inputs):
    """Minutes by which departures of the last hour are later than those of the last three."""
    hours = zip(inputs["origin_delay_1h"], inputs["origin_delay_3h"], strict=True)
    return {
        "origin_trend": [
            None if last is None or longer is None else last - longer for last, longer in hours
        ]
    }


service = FeatureService(name=SERVICE, features=[*views.values(), trends])
