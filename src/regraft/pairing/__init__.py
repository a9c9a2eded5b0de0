"""Pairing: which source site feeds which target site, with the evidence."""

from regraft.pairing.pairing import Pair, Pairing, kind_of, pair_sites

__all__ = ["Pair", "Pairing", "kind_of", "pair_sites"]
