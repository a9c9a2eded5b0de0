"""The hub, by the real client, against a tiny server on the loopback interface.

huggingface_hub reads its environment when it is imported, so each case is a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import save

COMMITS = {"main": "a" * 40, "v2": "b" * 40}
WEIGHTS = {c: save({"layers.0.q.weight": torch.full((2, 2), float(i))})
           for i, c in enumerate(COMMITS.values())}  # fmt: skip
CONFIG = b'{"model_type": "tiny"}'


def files_of(repo, commit):
    weights = WEIGHTS[commit]
    if repo == "org/model":
        return {"model.safetensors": weights, "model.fp16.safetensors": weights,
                "config.json": CONFIG, "model.onnx": b"large", "README.md": b"hi"}  # fmt: skip
    if repo == "org/pickled":
        return {"pytorch_model.bin": b"\x80\x02", "config.json": CONFIG}
    if repo == "org/texts":
        return {"README.md": b"hi"}
    if repo == "org/many":
        return {"epoch-1.safetensors": weights, "epoch-2.safetensors": weights}
    if repo in ("org/gated", "org/gated-files"):
        return {"model.safetensors": weights}
    return None


class Hub(BaseHTTPRequestHandler):
    """Enough of the hub's interface for listing and downloading."""

    asked: list[str] = []  # noqa: RUF012

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.asked.append(path)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo, rest = "/".join(parts[2:4]), parts[4:]
        else:
            repo, rest = "/".join(parts[:2]), parts[2:]
        revision = rest[1] if len(rest) > 1 else "main"
        token = self.headers.get("Authorization")
        if repo == "org/broken":
            return self.answer(500, b"{}")
        if repo == "org/private" and token != "Bearer hf_good":
            return self.answer(401, b"{}", X_Error_Code="RepoNotFound")
        if repo == "org/private":
            repo = "org/model"
        if repo == "org/gated" or (repo == "org/gated-files" and parts[0] != "api"):
            return self.answer(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="gated")
        commit = COMMITS.get(revision, revision)
        if commit not in WEIGHTS:
            return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
        files = files_of(repo, commit)
        if files is None:
            return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
        if parts[0] == "api" and "tree" in rest:
            tree = [{"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                    for n, b in files.items()]  # fmt: skip
            return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
        if parts[0] == "api":
            info = {"id": repo, "sha": commit, "siblings": [{"rfilename": n} for n in files]}
            return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        body = files["/".join(rest[2:])]
        etag = f'"{hashlib.sha1(body).hexdigest()}"'
        return self.answer(200, body, ETag=etag, X_Repo_Commit=commit)


@pytest.fixture(scope="module")
def endpoint():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


PROGRAM = """
import json, sys
from regraft.bases import open_base
from regraft.errors import RegraftError
for ref in sys.argv[1:]:
    try:
        base = open_base(ref)
        (site,) = base.weights
        print(json.dumps({"name": base.name, "revision": base.revision,
                          "value": float(base.read(site)[0, 0]),
                          "files": sorted(p.name for p in base.path.iterdir())}))
    except RegraftError as error:
        print(json.dumps({"error": type(error).__name__, "says": str(error)}))
"""


def ask(endpoint, home, *refs, **env):
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *refs],
        env={
            "PATH": os.environ["PATH"], "HF_HOME": str(home), "HF_ENDPOINT": endpoint,
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*", **env,
        },
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_fetching_and_then_offline(endpoint, tmp_path):
    Hub.asked.clear()
    commit = COMMITS["v2"]
    found = ask(endpoint, tmp_path, "org/model", "org/model@v2", f"org/model@{commit}")
    assert [f["value"] for f in found] == [0.0, 1.0, 1.0]
    assert [f["revision"] for f in found] == ["a" * 40, commit, commit]
    assert found[0]["name"] == "org/model"
    # Only what will be read was downloaded.
    assert found[0]["files"] == ["config.json", "model.safetensors"]
    assert not any("onnx" in path or "fp16" in path for path in Hub.asked)
    Hub.asked.clear()
    offline = ask(endpoint, tmp_path, "org/model", "org/model@v2", "org/other", HF_HUB_OFFLINE="1")
    assert offline[:2] == found[:2]
    assert offline[2]["error"] == "HubUnavailable"
    assert "HF_HUB_OFFLINE" in offline[2]["says"]
    assert Hub.asked == []
    # A hub that cannot be reached (port 9 answers nobody) is as good as offline.
    away = ask("http://127.0.0.1:9", tmp_path, "org/model", "org/other")
    assert away[0] == found[0]
    assert away[1]["error"] == "HubUnavailable"
    assert "cannot be reached" in away[1]["says"]


def test_refusals_say_what_to_do(endpoint, tmp_path):
    wanted = {
        "org/nothing": ("HubUnavailable", "no such repository"),
        "org/model@v9": ("HubUnavailable", "no revision 'v9'"),
        "org/gated": ("HubUnavailable", "gated"),
        "org/gated-files": ("HubUnavailable", "gated"),
        "org/private": ("HubUnavailable", "HF_TOKEN"),
        "org/pickled": ("PickleRefused", "pytorch_model.bin"),
        "org/texts": ("HubUnavailable", "no .safetensors"),
        "org/many": ("InputNotFound", "epoch-2.safetensors"),
        "org/bad--name..": ("HubUnavailable", "no such repository"),
    }
    found = ask(endpoint, tmp_path, *wanted)
    for (ref, (kind, says)), answer in zip(wanted.items(), found, strict=True):
        assert answer["error"] == kind, (ref, answer)
        assert says in answer["says"], (ref, answer)


def test_a_token_opens_a_private_repository(endpoint, tmp_path):
    (found,) = ask(endpoint, tmp_path, "org/private", HF_TOKEN="hf_good")
    assert found["value"] == 0.0


def test_a_hub_that_fails(endpoint, tmp_path):
    (found,) = ask(endpoint, tmp_path, "org/broken")
    assert found["error"] == "HubUnavailable"


def test_an_incomplete_cache_is_not_half_a_base(endpoint, tmp_path):
    ask(endpoint, tmp_path, "org/model")
    (link,) = tmp_path.glob("hub/*/snapshots/*/model.safetensors")
    link.unlink()
    (found,) = ask(endpoint, tmp_path, "org/model", HF_HUB_OFFLINE="1")
    assert found["error"] == "HubUnavailable"
    assert "lacks the weights" in found["says"]
