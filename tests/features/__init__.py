"""Tests of features on real stores."""
