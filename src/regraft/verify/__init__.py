"""Verifying an output: replay what its provenance says, and compare."""

from regraft.verify.replay import verify

__all__ = ["verify"]
