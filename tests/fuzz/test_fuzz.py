"""Spoiled files, thousands of them. ``make test`` runs the same 500 cases every time; ``make
test-all`` another 10,000, with the seed in the test's name."""

from __future__ import annotations

import json
import os
import shutil
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regraft.bases import open_base
from regraft.files import TensorFile, serialize
from regraft.subspaces import Cache, SubspaceLibrary
from tests.fuzz import files, properties

#: For the slow run; REGRAFT_FUZZ_SEED repeats one that failed.
SEED = int(os.environ.get("REGRAFT_FUZZ_SEED", Random().randrange(1 << 30)))
_JSON = b'0123456789{}[]",:-e.\\ \0\xff'


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A source and a target base, and a library that remembers them."""
    folder = tmp_path_factory.mktemp("fuzz")
    bases = [open_base(files.save_base(folder / name, i)) for i, name in enumerate(("v1", "v2"))]
    return (*bases, SubspaceLibrary(Cache(folder / "cache"), device="cpu"), folder)


@st.composite
def cases(draw: st.DrawFn) -> tuple[files.Case, int]:
    """A valid file of any family and dialect, and the seed of what is done to it."""
    families = draw(st.lists(st.sampled_from(files.FAMILIES), min_size=1, max_size=3))
    dialect = draw(st.sampled_from(files.DIALECTS))
    sites = draw(st.lists(st.integers(0, len(files.SITES) - 1), min_size=1, max_size=3))
    return files.make(families, dialect, sites, 0), draw(st.integers(0, 1 << 32))


def key_sets(world, case: files.Case, seed: int, name: str) -> None:
    source, target, library, folder = world
    rng = Random(seed)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        files.spoil(case, rng)
    path = case.write(folder / name)
    with properties.in_time():
        properties.inspected(path)
        properties.loaded(path, source, allow_unknown=rng.random() < 0.5)
        if rng.random() < 0.5:
            out = folder / f"{name}-out"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            properties.carried(path, source, target, out, library, rng)


def spoiled_bytes(good: bytes, rng: Random) -> bytes:
    """A few bytes changed, added or taken, mostly in the header."""
    bad = bytearray(good)
    end = 8 + int.from_bytes(good[:8], "little")
    for _ in range(rng.randint(1, 4)):
        where = rng.randrange(min(end, len(bad))) if rng.random() < 0.9 else rng.randrange(len(bad))
        kind = rng.randrange(5)
        if kind == 0:
            bad[where] = rng.randrange(256)
        elif kind == 1:
            bad[where] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del bad[where]
        elif kind == 3:
            bad.insert(where, rng.choice(_JSON))
        else:  # the same length: most other changes already fail at the offsets
            bad[where] = rng.choice(_JSON)
    return bytes(bad)


def spoiled_header(good: bytes, rng: Random) -> bytes:
    """Clean JSON that says something else."""
    end = 8 + int.from_bytes(good[:8], "little")
    header = json.loads(good[8:end])
    name = rng.choice(sorted(set(header) - {"__metadata__"}))
    entry = header[name]
    values = [0, -1, 1, 2**63, 2**64 - 1, 10**30, 1.5, None, True, "F32", "F4", [], [0], [2, 2], {}]
    kind = rng.randrange(5)
    if kind == 0:
        entry[rng.choice(sorted(entry))] = rng.choice(values)
    elif kind == 1:
        inside = entry[rng.choice(["shape", "data_offsets"])]
        inside[:1] = [rng.choice(values)]
    elif kind == 2:
        entry["dtype"] = rng.choice(["BF16", "F8_E4M3", "I64", "BOOL", "F16", "F64", "C64"])
    elif kind == 3:
        header[rng.choice(["", "\x1b[0m", "x" * 2000, "__metadata__", "a.alpha"])] = entry
        header.pop(name)
    else:
        header["__metadata__"] = rng.choice(values)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + good[end:]


def raw_bytes(world, seed: int) -> None:
    """An adapter file with spoiled bytes."""
    source, _, _, folder = world
    rng = Random(seed)
    case = files.make([rng.choice(files.FAMILIES)], rng.choice(["kohya", "diffusers"]), [0, 3], 0)
    good = case.write(folder / "good").read_bytes()
    path = folder / "bytes.safetensors"
    path.write_bytes(rng.choice([spoiled_bytes, spoiled_header])(good, rng))
    with properties.in_time():
        properties.inspected(path)
        properties.loaded(path, source, allow_unknown=True)


def spoiled_bases(world, seed: int) -> None:
    """A base with spoiled bytes, names, shapes or config, and a good adapter for it."""
    _, _, _, folder = world
    rng = Random(seed)
    path = folder / f"base-{rng.randrange(4)}"
    shutil.rmtree(path, ignore_errors=True)
    files.save_base(path, 0)
    weights = path / "unet" / "diffusion_pytorch_model.safetensors"
    if rng.random() < 0.5:
        weights.write_bytes(spoiled_bytes(weights.read_bytes(), rng))
    else:
        own = TensorFile(weights)
        case = files.Case({name: own.read(name) for name in own})
        for _ in range(rng.randint(1, 3)):
            files.spoil(case, rng)
        serialize(weights, case.tensors, case.metadata)
        if case.config is not None or rng.random() < 0.3:
            config = json.dumps(case.config or rng.choice(files.JUNK_VALUES))
            (path / "unet" / "config.json").write_text(config)
    adapter = files.make(["lora", "full", "dora"], "kohya", [0, 1, 2, 3], 0).write(folder / "fine")
    with properties.in_time():
        base = properties.attempt(lambda: open_base(path))
        if base is not None:
            properties.loaded(adapter, base, allow_unknown=True)


@settings(
    max_examples=250, derandomize=True, deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(case=cases())
def test_250_key_sets(world, case):
    key_sets(world, *case, "quick")


def test_150_headers(world):
    for seed in range(150):
        raw_bytes(world, seed)


def test_100_bases(world):
    for seed in range(100):
        spoiled_bases(world, seed)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_10000_cases(world, part):
    """Each part is 600 key sets, 250 headers and 150 bases."""
    print(f"REGRAFT_FUZZ_SEED={SEED}")
    rng = Random(SEED * 10 + part)
    for count, run in ((600, one_key_set), (250, raw_bytes), (150, spoiled_bases)):
        for _ in range(count):
            seed = rng.getrandbits(40)
            try:
                run(world, seed)
            except BaseException:
                print(f"{run.__name__}, seed {seed}")
                raise


def one_key_set(world, seed: int) -> None:
    rng = Random(seed)
    families = rng.choices(files.FAMILIES, k=rng.randint(1, 3))
    sites = rng.sample(range(len(files.SITES)), rng.randint(1, 3))
    key_sets(world, files.make(families, rng.choice(files.DIALECTS), sites, seed), seed, "slow")
