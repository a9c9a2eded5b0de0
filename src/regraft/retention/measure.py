"""Measuring: the adapter on the target by every way there is, on held-out data.

Everything is compared with the bare target base, with random updates of the same size (is it the
adapter, or any change?), and, if there is one, with an adapter retrained on the target. Only then
is R defined. Without it the gain is compared with the adapter's gain on its own source base, which
needs no training but says less: a target that had little to gain from the adapter looks the same as
one on which it does not work.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.bases import Base, open_base
from regraft.crossing import Progress, silent
from regraft.errors import BadOption
from regraft.files.atomic import check_free
from regraft.methods import MethodOptions
from regraft.report import write_measured
from regraft.retention.drawn import Drawing, Drawn, draw_all
from regraft.retention.figure import Retention, StrengthCurve, mean_error, ratio_error, retention
from regraft.retention.hosted import facts_of, has_strengths, load_any, random_of
from regraft.retention.measurement import Answers, Measurement, Random, Way, judge
from regraft.retention.meter import Meter, Reading, Steps
from regraft.retention.text import negative_flips
from regraft.retention.ways import OnTarget, Ways, as_it_is, by_methods
from regraft.running import Diffusion, Model, Pictures, Texts, open_model
from regraft.running.data import read_data
from regraft.subspaces import SubspaceLibrary
from regraft.versions import versions

if TYPE_CHECKING:
    from regraft.retention.hosted import AnyAdapter

STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
#: Draws of the random control.
DRAWS = 3


def measure(
    adapter: str | Path,
    *,
    target: str | Path | Base,
    data: str | Path,
    source: str | Path | Base | None = None,
    retrained: str | Path | None = None,
    methods: Sequence[str] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    options: MethodOptions | None = None,
    limit: int | None = None,
    timesteps: int = 8,
    drawing: Drawing | None = None,
    seed: int = 0,
    device: str = "auto",
    report: str | Path | None = None,
    overwrite: bool = False,
    library: SubspaceLibrary | None = None,
    progress: Progress = silent,
) -> Measurement:
    """Measure how well an adapter works on a target base. Nothing is written but the report.

    Parameters
    ----------
    adapter : str or Path
        Hub id, PEFT folder, or single ``.safetensors`` file.
    target : str, Path or Base
        The base it shall work on; one that runs (:func:`regraft.running.open_model`).
    data : str or Path
        Held-out data: see :func:`regraft.running.data.read_data`.
    source : str, Path or Base, optional
        The base it was trained on: it is then carried by every method. Without it, the adapter is
        taken as it is, as a file made for the target.
    retrained : str or Path, optional
        An adapter trained on the target; R is defined only with it.
    methods : sequence of str, optional
        Default: all. Copying is always among them.
    strengths : sequence of float
        Of the strength curve; 1.0 is always among them. Prompts and prefixes have 1.0 only.
    options : MethodOptions, optional
        Shared parameters of the methods.
    limit : int, optional
        Measure on the first so many items only.
    timesteps : int
        Of the denoising loss: times per picture.
    drawing : Drawing, optional
        Also draw pictures by every way, and score them.
    seed : int
        Of the noise, of the random control, of activation-map's own samples, and the first of the
        drawn pictures.
    device : str
        Where the bases run: "auto" (a GPU if there is one), "cpu", "cuda", …
    report : str or Path, optional
        Write a self-contained HTML page there.
    overwrite : bool
    library : SubspaceLibrary, optional
        Share one between calls to share its cache.
    progress : callable

    Returns
    -------
    Measurement

    Raises
    ------
    CannotRun
        The target (or, for the relative gain, the source) cannot be run.
    BadData
        The data cannot be used.
    NothingCarried
        No method carries anything to the target.
    RegraftError
        Any unreadable input or bad option.
    """
    started = time.perf_counter()
    strengths = _strengths(strengths)
    options = options or MethodOptions()
    _check(source, methods, limit, timesteps)
    if report is not None:
        check_free(Path(report), overwrite=overwrite)
    target_base = target if isinstance(target, Base) else open_base(target)
    if source is None:
        source_base, ways = None, as_it_is(adapter, target_base)
    else:
        source_base = source if isinstance(source, Base) else open_base(source)
        ways = by_methods(
            adapter,
            source_base,
            target_base,
            names=methods,
            options=options,
            library=library or SubspaceLibrary(device=device),
            progress=progress,
            seed=seed,
        )
    if not has_strengths(ways.loaded):
        strengths = (1.0,)
    reference = None if retrained is None else load_any(retrained, target_base)
    model = open_model(target_base, device=device)
    _check_drawing(drawing, model)
    items = read_data(data, model, limit=limit)
    on_source = source_base is not None and reference is None
    steps = Steps(progress, 1 + (reference is not None) + 2 * on_source + DRAWS)
    steps.total += len(ways.carried) * len(strengths)
    meter = Meter(model, items, steps, seed=seed, timesteps=timesteps)

    readings = {"target": meter.read()}
    if reference is not None:
        readings["retrained"] = meter.read(reference)
    elif source_base is not None:
        other = open_model(source_base, device=device)
        own = Meter(other, items, steps, seed=seed, timesteps=timesteps)
        readings["source"] = own.read(answers=False)
        readings["source with adapter"] = own.read(ways.loaded, answers=False)
    scale = _Scale.of(readings)
    found: dict[str, tuple[Way, Reading]] = {}
    for name, carried in ways.carried.items():
        at = {s: meter.read(carried.adapter, s, answers=s == 1.0) for s in strengths}
        found[name] = (_way(name, carried, at, readings, scale, ways), at[1.0])
    draws = [
        meter.read(random_of(ways.example, seed * DRAWS + i), answers=False).loss
        for i in range(DRAWS)
    ]
    bare = readings["target"]
    random = Random(sum(draws) / DRAWS, tuple((bare.loss - d) / scale.size for d in draws))
    drawn = _drawn(drawing, model, items, ways, reference, seed, progress)
    measured = [
        way if drawn is None else replace(way, pictures=drawn.scores(way.name))
        for way, _ in found.values()
    ]
    losses = {name: reading.losses for name, (_, reading) in found.items()}
    verdict, best, why = judge(measured, losses, scale.figure, random)
    result = Measurement(
        verdict=verdict,
        why=why,
        best=best,
        figure=scale.figure,
        metric=meter.metric,
        unit=meter.unit,
        items=len(bare.losses),
        ways=measured,
        random=random,
        losses={name: reading.loss for name, reading in readings.items()},
        refused=ways.refused,
        answers={n: r.score for n, r in readings.items() if r.score is not None},
        predicted=ways.predicted,
        adapter=facts_of(ways.loaded, adapter),
        source=None if source_base is None else _base_facts(source_base),
        target=_base_facts(target_base),
        retrained=None
        if reference is None or retrained is None
        else facts_of(reference, retrained),
        data={"ref": str(data), "kind": "pictures" if model.kind == "diffusion" else "texts"},
        parameters={
            **options.to_dict(),
            "methods": None if methods is None else list(methods),
            "strengths": list(strengths),
            "limit": limit,
            "timesteps": timesteps if model.kind == "diffusion" else None,
            "seed": seed,
            "draws": DRAWS,
            "draw": 0 if drawing is None else drawing.seeds,
            "captions": None if drawing is None else drawing.captions,
        },
        pictures=drawn,
        notes=[*ways.loaded.notes, *scale.notes, *_skipped(meter)],
        versions=versions(),
        seconds=time.perf_counter() - started,
    )
    if report is not None:
        result.report = str(report)
        order = [way.name for way in sorted(measured, key=lambda way: -way.figure)]
        gallery = None if drawn is None else drawn.gallery(order)
        write_measured(result.to_dict(), Path(report), gallery=gallery, overwrite=overwrite)
    return result


@dataclass(frozen=True)
class _Scale:
    """What a gain is divided by to become a figure: ``size``, the mean of ``items``."""

    figure: str
    items: Sequence[float]
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> float:
        return sum(self.items) / len(self.items)

    @classmethod
    def of(cls, readings: dict[str, Reading]) -> _Scale:
        """R where it is defined, else the relative gain where that is, else the loss removed."""
        bare = readings["target"]
        pairs = {"R": ("target", "retrained"), "relative gain": ("source", "source with adapter")}
        notes: tuple[str, ...] = ()
        for figure, (without, with_it) in pairs.items():
            if with_it not in readings:
                continue
            gains = readings[with_it].below(readings[without])
            made = cls(figure, gains)
            margin = 2 * (mean_error(gains) or 0.0)
            if made.size > margin:
                return made
            notes = (
                f"No {figure}: {with_it} gains {made.size:.3g} over {without}, not more than twice "
                f"its standard error ({margin:.3g}).",
            )
        return cls("loss removed", bare.losses, notes)

    def error_of(self, gains: Sequence[float]) -> float | None:
        """The standard error of mean(gains) over ``size``."""
        return ratio_error(gains, self.items) if len(gains) == len(self.items) else None


def _way(
    name: str,
    carried: OnTarget,
    at: dict[float, Reading],
    readings: dict[str, Reading],
    scale: _Scale,
    ways: Ways,
) -> Way:
    """One way, from its readings at every strength."""
    bare, one = readings["target"], at[1.0]
    gains = one.below(bare)
    values = {s: (bare.loss - reading.loss) / scale.size for s, reading in at.items()}
    return Way(
        name=name,
        loss=one.loss,
        gain=bare.loss - one.loss,
        gain_error=mean_error(gains),
        figure=values[1.0],
        figure_error=scale.error_of(gains),
        retention=_retention(one, readings),
        curve=StrengthCurve(tuple(values), tuple(values.values())),
        energy_kept=carried.energy_kept,
        sites=carried.sites,
        refused={**ways.left_out, **carried.refused},
        answers=_answers(one, readings),
    )


def _retention(one: Reading, readings: dict[str, Reading]) -> Retention | None:
    """R of the loss, with its error; None without a retrained adapter."""
    if "retrained" not in readings:
        return None
    bare, again = readings["target"], readings["retrained"]
    below = again.below(bare)
    found = retention(
        target=bare.loss,
        transferred=one.loss,
        retrained=again.loss,
        margin=2 * (mean_error(below) or 0.0),
        better="lower",
    )
    return replace(found, error=None if found.reason else ratio_error(one.below(bare), below))


def _answers(one: Reading, readings: dict[str, Reading]) -> Answers | None:
    """Exact answers against the bare target's, and R of their share."""
    bare, again = readings["target"], readings.get("retrained")
    if one.score is None or bare.score is None:
        return None
    found = None
    if again is not None and again.score is not None:
        right = [float(b) - float(a) for a, b in zip(bare.answers, again.answers, strict=True)]
        found = retention(
            target=bare.score,
            transferred=one.score,
            retrained=again.score,
            margin=2 * (mean_error(right) or 0.0),
            better="higher",
        )
    return Answers(one.score, negative_flips(bare.answers, one.answers), found)


def _drawn(
    drawing: Drawing | None,
    model: Model,
    items: Pictures | Texts,
    ways: Ways,
    reference: AnyAdapter | None,
    seed: int,
    progress: Progress,
) -> Drawn | None:
    """Pictures by the bare target, every way and the retrained adapter."""
    if drawing is None:
        return None
    assert isinstance(model, Diffusion)
    assert isinstance(items, Pictures)
    adapters: dict[str, AnyAdapter | None] = {"target": None}
    adapters |= {name: carried.adapter for name, carried in ways.carried.items()}
    if reference is not None:
        adapters["retrained"] = reference
    return draw_all(
        model, items, adapters, drawing, seed=seed, step=lambda n, of: progress("drawing", n, of)
    )


def _check_drawing(drawing: Drawing | None, model: Model) -> None:
    if drawing is not None and not isinstance(model, Diffusion):
        raise BadOption(
            f"{model.ref} is a language model: it draws no pictures.", fix="Leave out --draw."
        )


def _strengths(given: Sequence[float]) -> tuple[float, ...]:
    """Ascending, each once, 1.0 among them."""
    if not all(math.isfinite(s) and s > 0 for s in given):
        raise BadOption(
            f"The strengths {', '.join(map(str, given))} are not all positive numbers.",
            fix="Give strengths such as 0.5,1,1.5.",
        )
    return tuple(sorted({1.0, *map(float, given)}))


def _check(
    source: object, methods: Sequence[str] | None, limit: int | None, timesteps: int
) -> None:
    if source is None and methods is not None:
        raise BadOption(
            "Methods were named, but not the base that the adapter was trained on.",
            fix="Name it with --from; without it the adapter is measured as it is.",
        )
    for name, value in (("limit", limit), ("number of times", timesteps)):
        if value is not None and value < 1:
            raise BadOption(f"The {name} {value} is not a positive number.")


def _skipped(meter: Meter) -> list[str]:
    if not meter.skipped:
        return []
    return [f"{meter.skipped} text(s) left out: nothing to score within the model's context."]


def _base_facts(base: Base) -> dict[str, Any]:
    return {"ref": base.ref, "name": base.name, "revision": base.revision}
