"""The training loop: one process, checkpoints, and an output that appears whole."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import BadOption, CannotRun, NonFiniteTensor
from regraft.files import atomic_folder, locate, serialize
from regraft.files.atomic import check_free
from regraft.parallel import single_threaded
from regraft.running import Model, open_model, optional
from regraft.training.card import as_json, model_card
from regraft.training.facts import generator, hash_of, seed_of, told, versions
from regraft.training.families import config_for, saved_form, state_of
from regraft.training.machine import accelerating, checkpoint_gradients, known_device
from regraft.training.objectives import Objective, objective_for
from regraft.training.settings import Settings
from regraft.training.state import HEADER, LOG, Unfinished

Progress = Callable[[str, int, int], None]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_FILES = (WEIGHTS, CONFIG, "README.md", "training.json", LOG)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Below so many numbers one thread is faster, and gives the same bits on any number of cores.
_SMALL = 20_000_000
#: Items that are held out at most: they are run at every checkpoint.
_HELD_OUT = 256


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
    card), ``training.json`` (settings, hashes, versions) and ``log.csv``. Until it is there, the
    last checkpoint and the log are in ``OUTPUT.training/``. On a CPU in fp32, a run that was
    stopped and resumed writes the same bytes as one that was not.

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
    device = known_device(settings.device)
    model = open_model(settings.base, device=device, dtype=_DTYPES[settings.precision])
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
        run = _Run(settings, model, objective, unfinished)
        try:
            notes = run.go(progress)
        except torch.cuda.OutOfMemoryError as error:
            raise CannotRun(
                "The GPU has not enough memory for this run; its last checkpoint is kept.",
                fix="Pass a smaller --batch, --gradient-checkpointing, or --precision bf16.",
            ) from error
        result = run.write(output, overwrite, notes)
    unfinished.remove()
    result.seconds = time.monotonic() - started
    return result


class _Run:
    """One run, from the bare base to the tensors that are written."""

    def __init__(
        self,
        settings: Settings,
        model: Model,
        objective: Objective,
        unfinished: Unfinished,
    ) -> None:
        from peft import get_peft_model

        self.settings, self.kind, self.objective = settings, model.kind, objective
        self.device, self.unfinished = model.device, unfinished
        base: Any = model.modules[objective.component]
        order = torch.randperm(objective.count, generator=generator(settings.seed, "split"))
        held = round(settings.validation * objective.count)
        held = min(max(held, settings.validation > 0), objective.count - 1, _HELD_OUT)
        self.held_out = sorted(order[:held].tolist())
        self.rows = sorted(order[held:].tolist())
        where = locate(settings.base)
        self.facts: dict[str, Any] = {
            "settings": told(settings),
            "base": {
                "name": where.repo or where.path.resolve().name,
                "revision": where.revision,
                "sha256": hash_of(base),
            },
            "data": {
                "name": Path(settings.data).name,
                "items": len(self.rows),
                "held_out": len(self.held_out),
                "sha256": objective.digest,
            },
        }
        config = config_for(settings, base, self.kind)
        self.bare = self._validate(base)
        if settings.gradient_checkpointing:
            checkpoint_gradients(base, self.kind)
        torch.manual_seed(seed_of(settings.seed, "init"))
        try:
            with warnings.catch_warnings():
                # PEFT asks transformers for it under its old name.
                warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
                self.model: Any = get_peft_model(base, config)
        except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
            raise BadOption(
                f"PEFT cannot put {settings.family} on this base: {error}",
                fix="Choose other targets or options.",
            ) from error
        self.trained: dict[str, nn.Parameter] = {
            name: p for name, p in self.model.named_parameters() if p.requires_grad
        }
        if not self.trained:
            raise BadOption(f"{settings.family} trains nothing here.", fix="Change the options.")
        self.first = state_of(self.model) if settings.family == "pissa" else {}
        self.log = HEADER
        self.losses: list[float] = []
        self.resumed_at = 0

    def _validate(self, module: Any) -> float | None:
        if not self.held_out:
            return None
        module.eval()
        with self._autocast():
            return self.objective.held_out(module, self.held_out)

    def _autocast(self) -> Any:
        dtype = _DTYPES[self.settings.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def _batch(self, step: int) -> list[int]:
        """The items of a step: shuffled anew each time all have been seen."""
        found: list[int] = []
        count = len(self.rows)
        for place in range(step * self.settings.batch, (step + 1) * self.settings.batch):
            epoch, index = divmod(place, count)
            if not found or index == 0:
                shuffle = generator(self.settings.seed, "order", epoch)
                order = torch.randperm(count, generator=shuffle).tolist()
            found.append(self.rows[order[index]])
        return found

    def _inputs(self, step: int) -> tuple[dict[str, Any], Any]:
        draw = generator(self.settings.seed, "step", step)
        return self.objective.inputs(self._batch(step), draw)

    def go(self, progress: Progress) -> list[str]:
        """All steps that are left; returns what is to be told."""
        settings = self.settings
        parameters = list(self.trained.values())
        with accelerating(settings.precision, self.device.type) as accelerator:
            optimiser = accelerator.prepare(
                torch.optim.AdamW(parameters, lr=settings.rate, weight_decay=settings.weight_decay)
            )
            done = self._resume(optimiser, accelerator.scaler)
            with self.unfinished.logging(self.log) as log:
                for step in range(done, settings.steps):
                    progress("training", step, settings.steps)
                    line = self._step(step, accelerator, optimiser, parameters)
                    last = step + 1 == settings.steps
                    if last or (step + 1) % settings.save_every == 0:
                        found = self._validate(self.model)
                        line += "" if found is None else f"{found:.8g}"
                        self.log += line + "\n"
                        self._save(step + 1, optimiser, accelerator.scaler)
                    else:
                        self.log += line + "\n"
                    log.write(line + "\n")
            progress("training", settings.steps, settings.steps)
            calls = (self._inputs(step)[0] for step in range(min(16, settings.steps)))
            with accelerator.autocast():
                self.tensors, self.config, notes = saved_form(
                    settings, self.model, self.first, calls
                )
        self.final = self._validate(self.model)
        return self.objective.notes + notes

    def _step(
        self, step: int, accelerator: Any, optimiser: Any, parameters: list[nn.Parameter]
    ) -> str:
        """One step; its line of the log, without what is held out."""
        rate = self.settings.lr_at(step)
        for group in optimiser.param_groups:
            group["lr"] = rate
        self.model.train()
        call, wanted = self._inputs(step)
        torch.manual_seed(seed_of(self.settings.seed, "dropout", step))
        with accelerator.autocast():
            loss: Tensor = self.objective.loss(self.model(**call), wanted)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NonFiniteTensor(
                f"The loss is {value} at step {step + 1}.",
                fix="Lower the learning rate, or train in fp32 or bf16.",
            )
        optimiser.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, self.settings.clip)
        optimiser.step()
        self.losses.append(value)
        return f"{step + 1},{value:.8g},{rate:.8g},"

    def _save(self, done: int, optimiser: Any, scaler: Any) -> None:
        state = {
            "done": done,
            "weights": {name: p.detach().cpu() for name, p in self.trained.items()},
            "optimiser": optimiser.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "log": self.log,
            "losses": self.losses,
            "bare": self.bare,
        }
        self.unfinished.save(state, self.facts)

    def _resume(self, optimiser: Any, scaler: Any) -> int:
        """Take up the last state; how many steps are done."""
        state = self.unfinished.load(self.facts)
        if state is None:
            if self.bare is not None:
                self.log += f"0,,,{self.bare:.8g}\n"
            return 0
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state["weights"][name])
        optimiser.load_state_dict(state["optimiser"])
        if scaler is not None and state["scaler"] is not None:
            scaler.load_state_dict(state["scaler"])
        self.log, self.losses = state["log"], state["losses"]
        self.resumed_at = int(state["done"])
        return self.resumed_at

    def write(self, output: Path, overwrite: bool, notes: list[str]) -> TrainResult:
        """Write the folder."""
        bad = [name for name, t in self.tensors.items() if not torch.isfinite(t).all()]
        if bad:
            raise NonFiniteTensor("The trained adapter is not finite.", tensor=bad[0])
        tenth = max(1, len(self.losses) // 10)
        first = sum(self.losses[:tenth]) / tenth
        last = sum(self.losses[-tenth:]) / tenth
        count = sum(p.numel() for p in self.trained.values())
        base = self.facts["base"]
        self.config |= {"base_model_name_or_path": base["name"], "revision": base["revision"]}
        facts = self.facts | {
            "versions": versions(),
            "parameters": count,
            "notes": notes,
            "loss": {
                "first": first,
                "last": last,
                "validation_before": self.bare,
                "validation": self.final,
            },
        }
        with atomic_folder(output, overwrite=overwrite, replaceable=_FILES) as folder:
            sha256 = serialize(folder / WEIGHTS, self.tensors, {"format": "pt"})
            (folder / CONFIG).write_text(as_json(self.config), encoding="utf-8")
            (folder / "training.json").write_text(as_json(facts), encoding="utf-8")
            (folder / LOG).write_text(self.log, encoding="utf-8")
            card = model_card(facts, self.kind, output.name)
            (folder / "README.md").write_text(card, encoding="utf-8")
            size = (folder / WEIGHTS).stat().st_size
        return TrainResult(
            output=str(output),
            family=self.settings.family,
            steps=self.settings.steps,
            items=len(self.rows),
            held_out=len(self.held_out),
            parameters=count,
            bytes=size,
            sha256=sha256,
            loss_first=first,
            loss_last=last,
            validation_before=self.bare,
            validation=self.final,
            resumed_at=self.resumed_at,
            notes=notes,
        )
