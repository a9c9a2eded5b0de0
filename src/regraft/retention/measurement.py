"""What measuring found, as data, and what it amounts to in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from regraft.retention.drawn import Drawn, PictureScore
from regraft.retention.figure import TOLERANCE, Retention, StrengthCurve, mean_error

#: What gains are divided by, so that figures of different adapters compare.
FIGURES = {
    "R": "gain of the adapter retrained on the target",
    "relative gain": "gain of the adapter on its own source base",
    "loss removed": "loss of the bare target",
}


@dataclass(frozen=True)
class Answers:
    """Exact answers to prompts.

    ``score`` is the share of answers right to the letter, ``negative_flips`` the share that the
    bare target got right and this does not.
    """

    score: float
    negative_flips: float
    retention: Retention | None = None


@dataclass(frozen=True)
class Way:
    """One way of putting the adapter on the target, at strength 1.0.

    Attributes
    ----------
    name : str
        A method, or "as it is".
    loss, gain : float
        Mean held-out loss with the adapter, and the bare target's minus it (higher is better).
    gain_error : float or None
        Standard error of the gain, item by item against the bare target.
    figure, figure_error : float or None
        The gain divided by what :data:`FIGURES` says, and its standard error.
    retention : Retention or None
        R, when a retrained adapter was given.
    curve : StrengthCurve
        The figure at several strengths.
    energy_kept : float or None
        Share of ‖ΔW‖² that reached the target.
    refused : dict
        Sites that this way left out, and why.
    answers : Answers or None
        For a language model with prompts.
    pictures : dict
        Scorer -> score of the drawn pictures, if any were drawn.
    """

    name: str
    loss: float
    gain: float
    gain_error: float | None
    figure: float
    figure_error: float | None
    retention: Retention | None
    curve: StrengthCurve
    energy_kept: float | None
    sites: int
    refused: dict[str, str] = field(default_factory=dict)
    answers: Answers | None = None
    pictures: dict[str, PictureScore] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "curve": self.curve.to_dict()}


@dataclass(frozen=True)
class Random:
    """The control: random updates of the same size. ``figures`` holds one per draw."""

    loss: float
    figures: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.figures) / len(self.figures)


@dataclass
class Measurement:
    """Everything ``regraft measure`` reports.

    Attributes
    ----------
    verdict : "carry", "copy" or "don't"
        From what was measured.
    best : str
        The way with the highest figure.
    figure : str
        What the figures are: a key of :data:`FIGURES`.
    metric, unit : str
        The loss that was measured; lower is better.
    losses : dict
        Mean loss of the references: "target", and if measured "retrained", "source",
        "source with adapter".
    answers : dict
        Share of exact answers of the references, for a language model with prompts.
    refused : dict
        Methods that could not be tried, and why.
    predicted : dict or None
        What the weights alone say: verdict, method, why.
    pictures : Drawn or None
        What was drawn, and how the references score; the verdict does not depend on it.
    """

    verdict: str
    why: str
    best: str
    figure: str
    metric: str
    unit: str
    items: int
    ways: list[Way]
    random: Random
    losses: dict[str, float]
    refused: dict[str, str]
    answers: dict[str, float]
    predicted: dict[str, Any] | None
    adapter: dict[str, Any]
    source: dict[str, Any] | None
    target: dict[str, Any]
    retrained: dict[str, Any] | None
    data: dict[str, Any]
    parameters: dict[str, Any]
    pictures: Drawn | None = None
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    report: str | None = None
    seconds: float = 0.0

    def way(self, name: str) -> Way:
        """The way of this name.

        Raises
        ------
        KeyError
        """
        found = {way.name: way for way in self.ways}
        return found[name]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        own = {**vars(self), "ways": [way.to_dict() for way in self.ways]}
        own["random"] = {**asdict(self.random), "mean": self.random.mean}
        own["pictures"] = None if self.pictures is None else self.pictures.to_dict()
        return own


def figure_text(name: str, value: float, error: float | None = None) -> str:
    """A figure as people read it: "R = 0.87 ± 0.02", "12.0 ± 0.4 % of the loss removed".

    What follows ± is one standard error; a small one gets its figure a third decimal.
    """
    if name == "loss removed":
        more = "" if error is None else f" ± {100 * error:.1f}"
        return f"{100 * value:.1f}{more} % of the loss removed"
    if error is None:
        return f"{name} = {value:.2f}"
    digits = 2 if error >= 0.005 else 3
    return f"{name} = {value:.{digits}f} ± {error:.{digits}f}"


def judge(
    ways: Sequence[Way], losses: Mapping[str, Sequence[float]], figure: str, random: Random
) -> tuple[str, str, str]:
    """(verdict, best way, why) from what was measured.

    Parameters
    ----------
    ways : sequence of Way
    losses : mapping
        Per item, by the way's name: whether copying is as good is decided item by item.
    figure : str
        What the ways' figures are.
    random : Random
    """
    best = max(ways, key=lambda way: way.figure)
    said = figure_text(figure, best.figure, best.figure_error)
    if best.gain <= 0:
        tried = f"none of {len(ways)} ways" if len(ways) > 1 else "the adapter does not"
        first = f"{tried} makes" if len(ways) > 1 else f"{tried} make"
        why = f"{first[0].upper()}{first[1:]} the target better; the best gives {said}."
        return "don't", best.name, why
    why = _why(ways, best, losses, said, figure)
    doubt = []
    unsure = best.gain_error is None or best.gain < 2 * best.gain_error
    if unsure:
        doubt.append("The gain is within twice its standard error: measure on more items.")
    if best.figure <= max(random.figures):
        if unsure:
            why = (
                f"The best way gives {said}: within its error, and no better than random updates "
                "of the same size. Measure on more items to be sure."
            )
            return "don't", best.name, why
        doubt.append("Random updates of the same size do as well, so this is not the adapter.")
    if not best.curve.right_at_one:
        doubt.append(f"It is better at strength {best.curve.best:g} than at 1.0.")
    copied = best.name == "copy" or "as good" in why
    return ("copy" if copied else "carry"), best.name, " ".join([why, *doubt])


def _why(
    ways: Sequence[Way],
    best: Way,
    losses: Mapping[str, Sequence[float]],
    said: str,
    figure: str,
) -> str:
    copy = next((way for way in ways if way.name == "copy"), None)
    if len(ways) == 1:
        return f"{'Plain copying' if best is copy else 'The adapter'} helps: {said}."
    if best is copy:
        return f"Plain copying is the best of {len(ways)} ways: {said}."
    if copy is None:
        return f"{best.name} is the best of {len(ways)} ways: {said}."
    other = figure_text(figure, copy.figure, copy.figure_error)
    error = mean_error([b - a for a, b in zip(losses["copy"], losses[best.name], strict=True)])
    lead = copy.loss - best.loss
    if copy.gain > 0 and (
        best.figure - copy.figure <= TOLERANCE or (error is not None and lead <= 2 * error)
    ):
        return f"Plain copying ({other}) is as good as the best way, {best.name} ({said})."
    return f"{best.name} is the best of {len(ways)} ways: {said}; plain copying has {other}."
