"""Authoring and compiling graphs. Knows neither Ray nor HTTP."""
