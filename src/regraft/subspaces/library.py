"""What every method asks: subspaces and closeness of sites, computed once, then remembered."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable

import torch

from regraft.adapters import Site, same_matrix
from regraft.bases import Base
from regraft.errors import BadOption
from regraft.subspaces.cache import Cache
from regraft.subspaces.closeness import Closeness, closeness, phi
from regraft.subspaces.engine import ENGINE, Dimension, Subspace, decompose


def pick_device(name: str) -> torch.device:
    """``auto`` → CUDA if it is there, else the CPU; otherwise what was named.

    Raises
    ------
    BadOption
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise BadOption(
            f"The device {name!r} cannot be used: {first}", fix="Try --device cpu."
        ) from error
    return device


class SubspaceLibrary:
    """Subspaces and closeness, by base and site.

    Parameters
    ----------
    cache : Cache, optional
    device : str
        Where weights are decomposed.
    """

    def __init__(self, cache: Cache | None = None, device: str = "auto") -> None:
        self.cache = cache or Cache()
        self.device = pick_device(device)
        self._counting = threading.Lock()
        #: Decompositions done so far: a warm run does none.
        self.decompositions = 0

    def content_hash(self, base: Base, site: Site) -> str:
        """Content hash of one weight."""
        weight = base.at(site)
        parts = [self.cache.content_hash(file, tensor) for file, tensor in weight.stored()]
        if weight.quantised is None and len(parts) == 1:
            return parts[0]
        rule = weight.quantised.rule if weight.quantised else ""
        return hashlib.sha256(f"{rule}|{weight.rows}|{'|'.join(parts)}".encode()).hexdigest()

    def base_hash(self, base: Base, sites: Iterable[Site]) -> str:
        """One hash over the content of the named weights: which base this really was."""
        digest = hashlib.sha256()
        for site in sorted(sites):
            digest.update(f"{site} {self.content_hash(base, site)}\n".encode())
        return digest.hexdigest()

    def same_weight(self, source: Base, s: Site, target: Base, t: Site) -> bool:
        """Whether two sites hold the same bytes."""
        return self.content_hash(source, s) == self.content_hash(target, t)

    def subspace(self, base: Base, site: Site, dimension: Dimension) -> Subspace:
        """The top singular directions of one weight, from the cache if it has them."""
        sha = self.content_hash(base, site)
        found = self.cache.load_subspace(sha, dimension)
        if found is None:
            matrix = base.matrix(site).to(self.device)
            found = decompose(matrix, dimension)
            with self._counting:
                self.decompositions += 1
            self.cache.store_subspace(sha, found, dimension)
        return found

    def closeness(self, source: Base, s: Site, target: Base, t: Site) -> Closeness | None:
        """Cosine and relative difference of two weights; None if their shapes differ."""
        if not same_matrix(source.at(s).shape, target.at(t).shape):
            return None
        if self.same_weight(source, s, target, t):
            return Closeness(1.0, 0.0)
        key = f"closeness/1|{self.content_hash(source, s)}|{self.content_hash(target, t)}"
        known = self.cache.evidence(key)
        if known is None:
            known = closeness(source.read(s), target.read(t)).to_dict()
            self.cache.remember(key, known)
        return Closeness(**known)

    def phi(
        self, source: Base, s: Site, target: Base, t: Site, dimension: Dimension
    ) -> tuple[float, float] | None:
        """(Φ_l, Φ_r), LoRA-X Eq. 4; None if the shapes differ.

        Sides whose subspace is complete have Φ = 1.
        """
        if not same_matrix(source.at(s).shape, target.at(t).shape):
            return None
        if dimension.full or self.same_weight(source, s, target, t):
            return 1.0, 1.0
        key = self._phi_key(source, s, target, t, dimension)
        known = self.cache.evidence(key)
        if known is None:
            known = phi(self.subspace(source, s, dimension), self.subspace(target, t, dimension))
            self.cache.remember(key, known)
        return float(known[0]), float(known[1])

    def known_phi(
        self, source: Base, s: Site, target: Base, t: Site, dimension: Dimension
    ) -> tuple[float, float] | None:
        """Φ if it costs nothing: the same weight, or remembered from an earlier run."""
        if not same_matrix(source.at(s).shape, target.at(t).shape):
            return None
        if dimension.full or self.same_weight(source, s, target, t):
            return 1.0, 1.0
        known = self.cache.evidence(self._phi_key(source, s, target, t, dimension))
        return None if known is None else (float(known[0]), float(known[1]))

    def _phi_key(self, source: Base, s: Site, target: Base, t: Site, dimension: Dimension) -> str:
        pair = f"{self.content_hash(source, s)}|{self.content_hash(target, t)}"
        return f"phi/{ENGINE}|{dimension}|{pair}"
