"""Models from MLflow: references, artifact cache, trust, flavors, version slots and their swap."""
