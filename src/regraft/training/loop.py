"""One run, from the bare base to the tensors that are written: the split, the steps, the state."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regraft.errors import BadOption, NonFiniteTensor
from regraft.files import locate
from regraft.running import Diffusion, Language, Model
from regraft.training import quantised
from regraft.training.events import Events
from regraft.training.facts import generator, hash_of, seed_of, told
from regraft.training.families import config_for, saved_form, state_of
from regraft.training.machine import accelerating, checkpoint_gradients
from regraft.training.objectives import Objective
from regraft.training.previews import as_lines, as_png, complete, draw_grid, with_held_out
from regraft.training.prior import prior_for
from regraft.training.settings import Settings
from regraft.training.state import Unfinished

Progress = Callable[[str, int, int], None]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Items that are held out at most: they are run at every checkpoint.
_HELD_OUT = 256


class Run:
    """One run.

    Attributes
    ----------
    rows, held_out : list of int
        Items that are trained on, and those that are not.
    facts : dict
        What a resumed run must have in common with this one.
    prompts : list of str
        What is drawn or completed at checkpoints.
    tensors, config : dict
        What is to be written, after :meth:`go`.
    losses, log : what :meth:`go` noted of each step
    samples : list of dict
        Completions at the checkpoints so far.
    bare, final : float or None
        Held-out loss of the bare base, and with the adapter as it is written.
    """

    def __init__(
        self,
        settings: Settings,
        model: Model,
        objective: Objective,
        unfinished: Unfinished,
        *,
        events: Path | None = None,
        progress: Progress = lambda stage, done, total: None,
    ) -> None:
        from peft import get_peft_model

        self.settings, self.source, self.objective = settings, model, objective
        self.kind, self.device = model.kind, model.device
        self.unfinished, self.folder, self.progress = unfinished, events, progress
        base: Any = model.modules[objective.component]
        order = torch.randperm(objective.count, generator=generator(settings.seed, "split"))
        held = round(settings.validation * objective.count)
        held = min(max(held, settings.validation > 0), objective.count - 1, _HELD_OUT)
        self.held_out = sorted(order[:held].tolist())
        self.rows = sorted(order[held:].tolist())
        objective.begin(self.rows)
        self.prompts = with_held_out(settings.validation_prompts, objective.prompts(self.held_out))
        self.facts = self._facts(base)
        config = config_for(settings, base, self.kind)
        self.columns = ["step", "loss", "lr", "validation", *self.objective.terms]
        self.columns += ["prior"] if self.prior is not None else []
        self.log = ",".join(self.columns) + "\n"
        self.losses: list[float] = []
        self.samples: list[dict[str, Any]] = []
        self.resumed_at = 0
        self.saved = unfinished.load(self.facts)
        self.bare: float | None
        if self.saved is None:
            self.bare = self._validate(base)
            self.shown = self._preview(0, base)
        else:
            self.bare, self.shown = self.saved["bare"], None
        if settings.gradient_checkpointing:
            checkpoint_gradients(base, self.kind)
        torch.manual_seed(seed_of(settings.seed, "init"))
        try:
            with warnings.catch_warnings():
                # PEFT asks transformers for it under its old name.
                warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
                # It speaks of merging, which nothing here does.
                warnings.filterwarnings("ignore", ".*get_apply_tensor_subclass", UserWarning)
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

    def _facts(self, base: nn.Module) -> dict[str, Any]:
        """What the run is made of; the class pictures are read or drawn for it."""
        settings = self.settings
        where = locate(settings.base)
        told_of_base: dict[str, Any] = {
            "name": where.repo or where.path.resolve().name,
            "revision": where.revision,
            "sha256": hash_of(base),
        }
        self.storage = quantised.quantised(settings, base, self.kind)
        if self.storage:
            told_of_base["quantised"] = quantised.told(self.storage, settings)
        data: dict[str, Any] = {
            "name": Path(settings.data).name,
            "items": len(self.rows),
            "held_out": len(self.held_out),
            "sha256": self.objective.digest,
        }
        self.prior = prior_for(
            self.source,
            settings,
            base=json.dumps(told_of_base, sort_keys=True),
            folder=self.unfinished.prior,
            running=self._autocast(),
            progress=self.progress,
        )
        if self.prior is not None:
            name = None if settings.prior is None else Path(settings.prior).name
            data["prior"] = {
                "name": name,
                "items": self.prior.count,
                "sha256": self.prior.digest,
            }
        return {
            "settings": told(settings),
            "base": told_of_base,
            "data": data,
            "prompts": self.prompts,
        }

    def _validate(self, module: Any) -> float | None:
        if not self.held_out:
            return None
        module.eval()
        with self._autocast():
            return self.objective.held_out(module, self.held_out)

    def _autocast(self) -> Any:
        dtype = DTYPES[self.settings.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def _preview(self, step: int, module: Any) -> Any:
        """Draw or complete the validation prompts, and keep it; what is shown of it."""
        if not self.prompts:
            return None
        module.eval()
        count = self.settings.validation_seeds
        if isinstance(self.source, Diffusion):
            with self._autocast():
                grid = draw_grid(self.source, self.prompts, count)
            self.unfinished.keep_picture(step, as_png(grid))
            return grid
        assert isinstance(self.source, Language)
        with self._autocast():
            found = complete(self.source, module, self.prompts, count)
        self.samples += [{"step": step, **one} for one in found]
        self.unfinished.keep_samples(as_lines(self.samples))
        return "\n\n".join(f"{one['prompt']} **{one['completion']}**" for one in found)

    def _batch(self, step: int, rows: list[int] | None = None, word: str = "order") -> list[int]:
        """The items of a step: shuffled anew each time all have been seen."""
        rows = self.rows if rows is None else rows
        found: list[int] = []
        size = self.settings.batch * self.settings.accumulate
        for place in range(step * size, (step + 1) * size):
            epoch, index = divmod(place, len(rows))
            if not found or index == 0:
                shuffle = generator(self.settings.seed, word, epoch)
                order = torch.randperm(len(rows), generator=shuffle).tolist()
            found.append(rows[order[index]])
        return found

    def _halves(self, step: int) -> Iterator[tuple[Objective, list[int], torch.Generator, float]]:
        """What a step learns from: items, their draws, their weight in the loss."""
        seed = self.settings.seed
        yield self.objective, self._batch(step), generator(seed, "step", step), 1.0
        if self.prior is not None:
            rows = self._batch(step, list(range(self.prior.count)), "prior order")
            draw = generator(seed, "prior step", step)
            yield self.prior, rows, draw, self.settings.prior_weight

    def _calls(self, steps: int) -> Iterator[dict[str, Any]]:
        """The component's inputs in the first steps."""
        for step in range(steps):
            goal, rows, draw, _ = next(self._halves(step))
            yield from (part.call for part in goal.parts(rows, draw, self.settings.batch))

    def go(self) -> list[str]:
        """All steps that are left; returns what is to be told."""
        settings = self.settings
        parameters = list(self.trained.values())
        with accelerating(settings.precision, self.device.type) as accelerator:
            optimiser = accelerator.prepare(
                torch.optim.AdamW(parameters, lr=settings.rate, weight_decay=settings.weight_decay)
            )
            done = self._resume(optimiser, accelerator.scaler)
            events = Events(self.folder, done)
            try:
                self._show(0, events, {"validation": self.bare if done == 0 else None})
                with self.unfinished.logging(self.log) as log:
                    for step in range(done, settings.steps):
                        self.progress("training", step, settings.steps)
                        values = self._step(step, accelerator, optimiser, parameters)
                        last = step + 1 == settings.steps
                        checkpoint = last or (step + 1) % settings.save_every == 0
                        if checkpoint:
                            values["validation"] = self._validate(self.model)
                            self.shown = self._preview(step + 1, self.model)
                        line = self._line(step + 1, values)
                        self.log += line
                        if checkpoint:
                            self._save(step + 1, optimiser, accelerator.scaler)
                        log.write(line)
                        self._show(step + 1, events, values)
            finally:
                events.close()
            self.progress("training", settings.steps, settings.steps)
            with accelerator.autocast():
                self.tensors, self.config, notes = saved_form(
                    settings, self.model, self.first, self._calls(min(16, settings.steps))
                )
        self.final = self._validate(self.model)
        prior = [] if self.prior is None else self.prior.notes
        stored = quantised.notes(self.storage, settings)
        return [*stored, *self.objective.notes, *prior, *notes]

    def _line(self, step: int, values: dict[str, float | None]) -> str:
        """A line of the log."""
        cells = ["" if (v := values.get(c)) is None else f"{v:.8g}" for c in self.columns[1:]]
        return ",".join([str(step), *cells]) + "\n"

    def _show(self, step: int, events: Events, values: dict[str, float | None]) -> None:
        events.numbers(step, values)
        if isinstance(self.shown, str):
            events.text(step, self.shown)
        elif self.shown is not None:
            events.picture(step, self.shown)
        self.shown = None

    def _step(
        self, step: int, accelerator: Any, optimiser: Any, parameters: list[nn.Parameter]
    ) -> dict[str, float | None]:
        """One step; what is logged of it."""
        rate = self.settings.lr_at(step)
        for group in optimiser.param_groups:
            group["lr"] = rate
        self.model.train()
        optimiser.zero_grad(set_to_none=True)
        torch.manual_seed(seed_of(self.settings.seed, "dropout", step))
        total, values = 0.0, dict[str, float | None]()
        for goal, rows, draw, weight in self._halves(step):
            half = 0.0
            for part in goal.parts(rows, draw, self.settings.batch):
                # The backward pass too: gradient checkpointing runs layers again in it.
                with goal.watching(self.model):
                    with accelerator.autocast():
                        loss, terms = goal.loss(self.model, part)
                    value = float(loss.detach())
                    if not math.isfinite(value):
                        raise NonFiniteTensor(
                            f"The loss is {value} at step {step + 1}.",
                            fix="Lower the learning rate, or train in fp32 or bf16.",
                        )
                    accelerator.backward(loss * (weight * part.share))
                half += value * part.share
                for name, term in terms.items():
                    values[name] = (values.get(name) or 0.0) + term * part.share
            total += weight * half
            if goal is self.prior:
                values["prior"] = half
        accelerator.clip_grad_norm_(parameters, self.settings.clip)
        optimiser.step()
        self.losses.append(total)
        return {**values, "loss": total, "lr": rate}

    def _save(self, done: int, optimiser: Any, scaler: Any) -> None:
        state = {
            "done": done,
            "weights": {name: p.detach().cpu() for name, p in self.trained.items()},
            "optimiser": optimiser.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "log": self.log,
            "losses": self.losses,
            "samples": self.samples,
            "bare": self.bare,
        }
        self.unfinished.save(state, self.facts)

    def _resume(self, optimiser: Any, scaler: Any) -> int:
        """Take up the last state; how many steps are done."""
        state, self.saved = self.saved, None
        if state is None:
            if self.bare is not None:
                self.log += self._line(0, {"validation": self.bare})
            return 0
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state["weights"][name])
        optimiser.load_state_dict(state["optimiser"])
        if scaler is not None and state["scaler"] is not None:
            scaler.load_state_dict(state["scaler"])
        self.log, self.losses, self.samples = state["log"], state["losses"], state["samples"]
        self.resumed_at = int(state["done"])
        return self.resumed_at
