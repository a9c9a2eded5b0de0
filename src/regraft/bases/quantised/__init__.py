"""Quantised weights: one file per format, read one weight at a time on the CPU."""

from regraft.bases.quantised.cost import cost
from regraft.bases.quantised.recognise import Recognised, recognise

__all__ = ["Recognised", "cost", "recognise"]
