"""Opening bases to run them: the embedded kind, Stable Diffusion, language models, and refusals."""

from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

from regraft.bases import open_base
from regraft.demo import pair
from regraft.errors import CannotRun, InputNotFound, MalformedFile
from regraft.running import Diffusion, Language, Pictures, denoising_losses, open_model
from tests import factories
from tests.running.bases import language_folder, stable_diffusion_folder


def noise_pictures(size: int, n: int = 3) -> Pictures:
    draw = np.random.default_rng(0)
    return Pictures(
        draw.integers(0, 256, (n, size, size, 3), dtype=np.uint8), ["a b", "c", "d"][:n]
    )


@pytest.fixture(scope="module")
def target():
    return open_model(pair.TARGET)


def test_the_embedded_pair_opens_with_the_components_of_its_sites(target):
    assert isinstance(target, Diffusion)
    assert (target.kind, target.size) == ("diffusion", 32)
    assert set(open_base(pair.TARGET).components) <= set(target.modules)
    assert not any(p.requires_grad for m in target.modules.values() for p in m.parameters())


def test_a_base_that_is_open_already_can_be_run():
    assert open_model(open_base(pair.SOURCE)).size == 32


def test_losses_are_per_picture_and_do_not_depend_on_the_batch(target):
    images, captions = pair.load_heldout()
    five = Pictures(images[:5], captions[:5])
    whole = denoising_losses(target, five, timesteps=2)
    assert whole.shape == (5,)
    assert torch.allclose(whole, denoising_losses(target, five, timesteps=2, batch=2), rtol=1e-5)
    alone = denoising_losses(target, Pictures(images[:1], captions[:1]), timesteps=2)
    assert torch.allclose(whole[:1], alone, rtol=1e-5)
    assert not torch.allclose(whole, denoising_losses(target, five, timesteps=2, seed=1))


@pytest.mark.parametrize("xl", [False, True], ids=["sd", "sdxl"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_of_stable_diffusion_is_that_of_diffusers_own_training(tmp_path, xl, prediction):
    """Against DDPMScheduler's add_noise and get_velocity, which its training scripts use."""
    from diffusers import DDPMScheduler

    folder = stable_diffusion_folder(tmp_path / "sd", xl=xl, prediction=prediction)
    model = open_model(folder)
    assert set(model.modules) == set(open_base(folder).components)
    pictures = noise_pictures(model.size)
    found = denoising_losses(model, pictures, timesteps=[0.3, 0.9], batch=2)

    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    pipeline = model.pipeline
    wanted = torch.zeros(len(pictures))
    with torch.no_grad():
        pixels = torch.from_numpy(pictures.images).permute(0, 3, 1, 2) / 127.5 - 1
        x0 = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
        for i, caption in enumerate(pictures.captions):
            e = torch.randn(x0[i].shape, generator=torch.Generator().manual_seed(i))[None]
            embeds = pipeline.encode_prompt(
                caption,
                device="cpu",
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
            )
            more = {}
            if xl:
                ids = torch.tensor([[model.size, model.size, 0, 0, model.size, model.size]])
                more = {"text_embeds": embeds[2], "time_ids": ids}
            for step in (300, 900):
                t = torch.tensor([step])
                x = scheduler.add_noise(x0[i : i + 1], e, t)
                guess = pipeline.unet(x, t, embeds[0], added_cond_kwargs=more).sample
                goal = e
                if prediction == "v_prediction":
                    goal = scheduler.get_velocity(x0[i : i + 1], e, t)
                wanted[i] += (guess - goal).pow(2).mean() / 2
    assert torch.allclose(found.float(), wanted, rtol=1e-4)


def test_stable_diffusion_draws_the_same_picture_for_the_same_seed(tmp_path):
    model = open_model(stable_diffusion_folder(tmp_path / "sd"))
    first = model.sample(["a"], 3, steps=2)
    assert first.shape == (1, model.size, model.size, 3)
    assert np.array_equal(first, model.sample(["a"], 3, steps=2))
    assert not np.array_equal(first, model.sample(["a"], 4, steps=2))


def test_a_half_precision_variant_is_found(tmp_path):
    folder = stable_diffusion_folder(tmp_path / "sd")
    for part in ("unet", "vae", "text_encoder"):
        for path in (folder / part).glob("*.safetensors"):
            halved = {name: w.half() for name, w in load_file(path).items()}
            save_file(
                halved, path.with_suffix("").with_suffix(".fp16.safetensors"), {"format": "pt"}
            )
            path.unlink()
    model = open_model(folder)
    assert {p.dtype for m in model.modules.values() for p in m.parameters()} == {torch.float32}
    assert torch.isfinite(denoising_losses(model, noise_pictures(model.size), timesteps=1)).all()


def test_a_language_model_opens_with_its_tokenizer(tmp_path):
    model = open_model(language_folder(tmp_path / "lm"))
    assert isinstance(model, Language)
    assert set(model.modules) == {""}
    ids = model.tokenizer("a b", return_tensors="pt")["input_ids"]
    assert model.model(ids).logits.shape[:2] == ids.shape


def refuse(folder, says, error=CannotRun):
    with pytest.raises(error, match=says):
        open_model(folder)


def test_what_cannot_run_says_why(tmp_path):
    refuse(factories.ldm_file(tmp_path / "one.safetensors"), "single checkpoint")
    refuse(factories.save(factories.unet(), tmp_path / "unet"), "one part of a pipeline")
    empty = tmp_path / "empty"
    empty.mkdir()
    refuse(empty, "neither model_index")
    (empty / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    refuse(empty, "FluxPipeline")
    (empty / "model_index.json").write_text("[")
    refuse(empty, "JSON", MalformedFile)
    refuse("no-such-folder", "No such file", InputNotFound)


def test_a_folder_that_is_not_whole_says_so(tmp_path):
    folder = stable_diffusion_folder(tmp_path / "sd")
    shutil.rmtree(folder / "vae")
    refuse(folder, "could not be loaded")
    shutil.copytree(pair.SOURCE, tmp_path / "v1")
    shutil.rmtree(tmp_path / "v1" / "text_encoder")
    refuse(tmp_path / "v1", "could not be loaded")


def test_a_language_model_without_its_tokenizer_is_refused(tmp_path):
    folder = language_folder(tmp_path / "lm")
    for file in folder.glob("*token*"):
        file.unlink()
    refuse(folder, "no tokenizer")


def test_a_language_model_without_all_its_weights_is_refused(tmp_path):
    """transformers would draw the missing ones at random and only warn."""
    folder = language_folder(tmp_path / "lm")
    state = load_file(folder / "model.safetensors")
    state.pop("lm_head.weight")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    refuse(folder, "lm_head")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    refuse(folder, "not a causal")


def test_without_diffusers_the_error_says_what_to_install(monkeypatch):
    import sys

    from regraft.errors import MissingDependency

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingDependency, match="regraft\\[demo\\]"):
        open_model(pair.SOURCE)


@pytest.mark.parametrize("kind", ["emoji", "sd"])
def test_opening_in_half_precision_says_nothing(kind, tmp_path, capfd, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    folder = pair.TARGET if kind == "emoji" else stable_diffusion_folder(tmp_path / "sd")
    capfd.readouterr()
    model = open_model(folder, dtype=torch.bfloat16)
    assert {p.dtype for m in model.modules.values() for p in m.parameters()} == {torch.bfloat16}
    assert capfd.readouterr() == ("", "")
    assert not [m for m in caplog.messages if "float32" in m]
