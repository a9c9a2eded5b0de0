"""Measurements of speed and memory. Each module here is run with ``python -m``."""
