"""Training: from settings to a folder that appears whole."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from regraft.errors import BadOption, CannotRun, NonFiniteTensor
from regraft.files import atomic_folder, serialize
from regraft.files.atomic import check_free
from regraft.parallel import single_threaded
from regraft.running import open_model, optional
from regraft.training import quantised
from regraft.training.card import as_json, model_card
from regraft.training.events import beside, need_tensorboard
from regraft.training.facts import versions
from regraft.training.items import objective_for
from regraft.training.loop import DTYPES, Progress, Run
from regraft.training.machine import known_device
from regraft.training.previews import as_lines, read_prompts
from regraft.training.settings import Settings
from regraft.training.state import LOG, PICTURES, SAMPLES, Unfinished

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_FILES = (WEIGHTS, CONFIG, "README.md", "training.json", LOG, SAMPLES)
#: Below so many numbers one thread is faster, and gives the same bits on any number of cores.
_SMALL = 20_000_000


@dataclass
class TrainResult:
    """What a run reports.

    Attributes
    ----------
    parameters : int
        Numbers that were trained.
    loss_first, loss_last : float
        Mean training loss over the first and the last tenth of the steps.
    validation_before, validation : float or None
        Held-out loss of the bare base, and with the adapter as it was written.
    resumed_at : int
        The step it went on from; 0 for a run in one piece.
    """

    output: str
    family: str
    steps: int
    items: int
    held_out: int
    parameters: int
    bytes: int
    sha256: str
    loss_first: float
    loss_last: float
    validation_before: float | None
    validation: float | None
    resumed_at: int
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The fields by name; what is not a finite number is null."""
        found = asdict(self)
        bad = [k for k, v in found.items() if isinstance(v, float) and not math.isfinite(v)]
        return found | dict.fromkeys(bad)


def train(
    settings: Settings,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> TrainResult:
    """Train an adapter and write it as a PEFT folder.

    The folder holds ``adapter_model.safetensors``, ``adapter_config.json``, ``README.md`` (model
    card), ``training.json`` (settings, hashes, versions) and ``log.csv``; with validation prompts
    also ``pictures/step-N.png`` or ``samples.jsonl``. Until it is there, the last checkpoint and
    the log are in ``OUTPUT.training/``. On a CPU in fp32, a run that was stopped and resumed writes
    the same bytes as one that was not.

    Parameters
    ----------
    settings : Settings
    output : str or Path
        A folder that does not exist yet.
    resume : bool
        Go on from the last checkpoint, if there is one.
    overwrite : bool
        Replace an output, and forget an unfinished run that is not resumed.

    Raises
    ------
    BadOption, BadData, CannotRun, InputNotFound, MalformedFile, MissingDependency
    NonFiniteTensor
        The loss is not a number any more. The last checkpoint is kept.
    OutputExists, OutputFailed
    """
    started = time.monotonic()
    output = Path(output)
    check_free(output, overwrite=overwrite)
    if not output.name:
        raise BadOption("The output has no name.", fix="Name a folder.")
    with optional("Training"):
        import accelerate  # type: ignore[import-untyped]  # noqa: F401
        import peft  # noqa: F401
    if settings.tensorboard:
        need_tensorboard()
    settings = replace(settings, validation_prompts=read_prompts(settings.validation_prompts))
    device = known_device(settings.device)
    model = open_model(settings.base, device=device, dtype=DTYPES[settings.precision])
    if settings.precision == "fp16" and model.device.type == "cpu":
        raise BadOption("fp16 is not trained on a CPU.", fix="Pass --precision bf16 or fp32.")
    objective = objective_for(model, settings)
    unfinished = Unfinished(output)
    unfinished.begin(resume=resume, overwrite=overwrite)
    base: Any = model.modules[objective.component]
    small = sum(p.numel() for p in base.parameters()) < _SMALL
    devices = [model.device] if model.device.type == "cuda" else []
    with (
        single_threaded() if small and not devices else nullcontext(),
        torch.random.fork_rng(devices=devices),
    ):
        try:
            run = Run(
                settings,
                model,
                objective,
                unfinished,
                events=beside(output) if settings.tensorboard else None,
                progress=progress,
            )
            notes = run.go()
        except torch.cuda.OutOfMemoryError as error:
            raise CannotRun(
                "The GPU has not enough memory for this run; its last checkpoint is kept.",
                fix="Pass a smaller --batch with --accumulate, --gradient-checkpointing, or "
                "--precision bf16.",
            ) from error
        result = write(run, output, overwrite, notes)
    unfinished.remove()
    result.seconds = time.monotonic() - started
    return result


def write(run: Run, output: Path, overwrite: bool, notes: list[str]) -> TrainResult:
    """Write the folder of a run that is over.

    Raises
    ------
    NonFiniteTensor, OutputExists, OutputFailed
    """
    bad = [name for name, t in run.tensors.items() if not torch.isfinite(t).all()]
    if bad:
        raise NonFiniteTensor("The trained adapter is not finite.", tensor=bad[0])
    tenth = max(1, len(run.losses) // 10)
    first = sum(run.losses[:tenth]) / tenth
    last = sum(run.losses[-tenth:]) / tenth
    count = sum(p.numel() for p in run.trained.values())
    base = run.facts["base"]
    config = run.config | {"base_model_name_or_path": base["name"], "revision": base["revision"]}
    pictures = _pictures(run)
    facts = run.facts | {
        "versions": versions(),
        "parameters": count,
        "notes": notes,
        "pictures": [path.name for path in pictures],
        "loss": {
            "first": first,
            "last": last,
            "validation_before": run.bare,
            "validation": run.final,
        },
    }
    replaceable = [*_FILES, *_own_pictures(output)]
    metadata = {"format": "pt", **quantised.metadata(run.storage)}
    with atomic_folder(output, overwrite=overwrite, replaceable=replaceable) as folder:
        sha256 = serialize(folder / WEIGHTS, run.tensors, metadata)
        (folder / CONFIG).write_text(as_json(config), encoding="utf-8")
        (folder / "training.json").write_text(as_json(facts), encoding="utf-8")
        (folder / LOG).write_text(run.log, encoding="utf-8")
        if run.samples:
            (folder / SAMPLES).write_text(as_lines(run.samples), encoding="utf-8")
        if pictures:
            (folder / PICTURES).mkdir()
        for path in pictures:
            (folder / PICTURES / path.name).write_bytes(path.read_bytes())
        card = model_card(facts, run.kind, output.name, run.samples)
        (folder / "README.md").write_text(card, encoding="utf-8")
        size = (folder / WEIGHTS).stat().st_size
    return TrainResult(
        output=str(output),
        family=run.settings.family,
        steps=run.settings.steps,
        items=len(run.rows),
        held_out=len(run.held_out),
        parameters=count,
        bytes=size,
        sha256=sha256,
        loss_first=first,
        loss_last=last,
        validation_before=run.bare,
        validation=run.final,
        resumed_at=run.resumed_at,
        notes=notes,
    )


def _pictures(run: Run) -> list[Path]:
    """The grids of this run's checkpoints, in order."""
    every, steps = run.settings.save_every, run.settings.steps
    at = dict.fromkeys([*range(0, steps, every), steps])
    paths = [run.unfinished.pictures / f"step-{step}.png" for step in at]
    return [path for path in paths if path.is_file()] if run.kind == "diffusion" else []


def _own_pictures(output: Path) -> list[str]:
    """Grids of an output that may be replaced."""
    return [f"{PICTURES}/{path.name}" for path in (output / PICTURES).glob("step-*.png")]
