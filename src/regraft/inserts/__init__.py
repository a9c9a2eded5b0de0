"""Inserts: what an adapter adds to a model's activations instead of to a weight."""
