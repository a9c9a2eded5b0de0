"""What is fetched from the hub to run a base, beside what carrying an adapter needs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from regraft.files import hub, locate

PIPELINE = (
    "model_index.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "safety_checker/model.safetensors",
    "sd-v1.safetensors",
    "README.md",
)
LANGUAGE = ("config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json")


@pytest.fixture
def fetched(monkeypatch, tmp_path):
    """Lists what would be downloaded of a repository with these files."""

    def of(files, *, to_run):
        asked = {}
        siblings = [SimpleNamespace(rfilename=name) for name in files]
        api = SimpleNamespace(model_info=lambda *_, **__: SimpleNamespace(siblings=siblings))

        def download(repo, *, allow_patterns, **_):
            asked["names"] = set(allow_patterns)
            return str(tmp_path)

        monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        locate("org/name", to_run=to_run)
        return asked["names"]

    return of


def test_to_run_a_pipeline_its_vae_and_tokenizer_come_too(fetched):
    carry, run = (fetched(PIPELINE, to_run=to_run) for to_run in (False, True))
    assert run - carry == {"vae/diffusion_pytorch_model.safetensors", "tokenizer/merges.txt"}
    assert not {"safety_checker/model.safetensors", "sd-v1.safetensors", "README.md"} & run
    assert not [name for name in run if "fp16" in name]


def test_to_run_a_language_model_its_tokenizer_comes_too(fetched):
    assert fetched(LANGUAGE, to_run=True) == set(LANGUAGE)
    assert "tokenizer.model" not in fetched(LANGUAGE, to_run=False)


def test_chat_templates_come_and_code_does_not(fetched):
    templates = {"chat_template.jinja", "additional_chat_templates/tool_use.jinja"}
    files = (*LANGUAGE, *templates, "modeling_own.py", "deep/er/x.jinja")
    assert fetched(files, to_run=True) == {*LANGUAGE, *templates}
    assert not templates & fetched(files, to_run=False)


def test_a_cached_copy_without_its_vae_is_not_enough_to_run(monkeypatch, tmp_path):
    """Offline, where the cache knows the whole list of files."""
    from regraft.errors import HubUnavailable

    for name in PIPELINE:
        if not name.startswith("vae/"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
    tree = [SimpleNamespace(path=name) for name in PIPELINE]
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr(
        "huggingface_hub.get_cached_repo_tree", lambda *_, **__: tree, raising=False
    )
    assert hub.from_hub("org/name", None) == tmp_path
    with pytest.raises(HubUnavailable, match="vae"):
        hub.from_hub("org/name", None, to_run=True)
