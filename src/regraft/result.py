"""What a transfer did: one object for the command line, Python, the report and the tests."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class SiteResult:
    """One carried site.

    ``share`` is its part of the adapter's energy; ``kept`` and ``kept_by_copy`` are shares of its
    own energy ‖ΔW_t‖² / ‖ΔW_s‖².
    """

    site: str
    source: str
    kind: str
    shape: tuple[int, ...]
    rank_in: int
    rank_out: int
    share: float
    kept: float
    kept_by_copy: float
    cosine: float | None
    difference: float | None
    phi_left: float | None = None
    phi_right: float | None = None


@dataclass
class TransferResult:
    """Everything a transfer reports.

    Attributes
    ----------
    verdict : "carry", "copy" or "don't"
        What the evidence recommends, whatever method was run.
    method : str
        The method that was run ("none" if the verdict stopped it).
    energy_kept, energy_kept_by_copy : float
        Share of the whole adapter's energy that reached the target, and what copying would give.
    predicted : dict
        Retention R predicted from the weights, of plain copying and of the method that was run.
    sites_refused : dict
        Site or tensor name → reason.
    output, sha256 : str or None
        None on a dry run, or when nothing was written.
    """

    verdict: str
    why: str
    method: str
    parameters: dict[str, Any]
    adapter: dict[str, Any]
    source: dict[str, Any]
    target: dict[str, Any]
    evidence: dict[str, Any]
    pairing: str
    sites: list[SiteResult] = field(default_factory=list)
    sites_refused: dict[str, str] = field(default_factory=dict)
    energy_kept: float = 0.0
    energy_kept_by_copy: float = 0.0
    predicted: dict[str, float] = field(default_factory=dict)
    output: str | None = None
    sha256: str | None = None
    dialect: str = ""
    dtype: str = ""
    report: str | None = None
    dry_run: bool = False
    decompositions: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def sites_carried(self) -> int:
        return len(self.sites)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "sites_carried": self.sites_carried}


@dataclass(frozen=True)
class ConvertedSite:
    """One converted site.

    ``share`` is its part of the adapter's energy, ``kept`` the share of its own energy that was
    kept; ``rank_in`` is the rank it was trained at, where its family has one.
    """

    site: str
    family: str
    shape: tuple[int, ...]
    rank_in: int
    rank_out: int
    parameters_out: int
    share: float
    kept: float


@dataclass
class ConvertResult:
    """Everything a conversion reports.

    Attributes
    ----------
    base : dict or None
        None if no base was given; its hash is None if no weight of it was needed.
    energy_kept : float
        Share of the whole adapter's energy ‖ΔW‖² that was kept; exactly 1.0 if all of it was.
    families : dict
        Family → sites, energy kept, and the smallest and largest rank before and after.
    parameters_in, parameters_out, bytes_in, bytes_out : int
        Numbers stored, and the sizes of the weights files (0 if nothing was written).
    sites_refused : dict
        Site or tensor name → reason.
    """

    adapter: dict[str, Any]
    base: dict[str, Any] | None
    parameters: dict[str, Any]
    sites: list[ConvertedSite] = field(default_factory=list)
    sites_refused: dict[str, str] = field(default_factory=dict)
    energy_kept: float = 0.0
    families: dict[str, dict[str, Any]] = field(default_factory=dict)
    parameters_in: int = 0
    parameters_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    output: str | None = None
    sha256: str | None = None
    dialect: str = ""
    dtype: str = ""
    dry_run: bool = False
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


@dataclass(frozen=True)
class MergedSite:
    """One merged weight.

    ``relative_change`` is ‖ΔW‖ / ‖W‖ (Frobenius, strength included), ``lost_to_rounding``
    ‖stored − exact‖ / ‖ΔW‖. ``dtype`` is what it is stored in; ``moved`` says whether any stored
    number differs.
    """

    site: str
    family: str
    shape: tuple[int, ...]
    dtype: str
    relative_change: float
    lost_to_rounding: float
    moved: bool


@dataclass
class MergeResult:
    """Everything a merge reports.

    Attributes
    ----------
    adapters : list of dict
        With the strength of each.
    relative_change, lost_to_rounding : float
        As in :class:`MergedSite`, over all sites together.
    files : list of str
        Weight files that were made anew, by their path in the output.
    sites_refused : dict
        Site or tensor name → reason.
    dtype : str
        What was asked for; empty where every weight kept its own.
    bytes_out : int
        Of the whole output.
    """

    adapters: list[dict[str, Any]]
    base: dict[str, Any]
    sites: list[MergedSite] = field(default_factory=list)
    sites_refused: dict[str, str] = field(default_factory=dict)
    relative_change: float = 0.0
    lost_to_rounding: float = 0.0
    output: str | None = None
    files: list[str] = field(default_factory=list)
    dtype: str = ""
    bytes_out: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def largest(self) -> MergedSite | None:
        """The site that changed most, relative to its weight."""
        return max(self.sites, key=lambda site: site.relative_change, default=None)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        largest = self.largest
        return {**asdict(self), "largest": None if largest is None else largest.site}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: ``status`` is "passed", "failed" or "inconclusive"."""

    name: str
    status: str
    detail: str


@dataclass
class VerifyResult:
    """What a verification found.

    Attributes
    ----------
    status : "passed", "failed" or "inconclusive"
        Passed only if every check passed; failed if any failed.
    how : str
        In a few words: byte for byte, or tensors within a tolerance, or the reason.
    """

    file: str
    operation: str = ""
    checks: list[Check] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def status(self) -> str:
        found = {check.status for check in self.checks}
        if "failed" in found:
            return "failed"
        return "passed" if found == {"passed"} else "inconclusive"

    @property
    def how(self) -> str:
        return next(
            (c.detail for c in reversed(self.checks) if c.status == self.status), "nothing checked"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"status": self.status, "how": self.how, **asdict(self)}
