"""Retention: how well an adapter works on the target, measured on held-out data."""
