"""Do the stages refuse damaged and hostile files? Mutates checkpoints, states to resume from, dataset shards and meta.json, and reads them.

    python benchmark/fuzz.py --cases 10000                # 10,000 mutated files
    python benchmark/fuzz.py --seed 0 --only 4711         # this case alone, with its traceback

Every case calls what the scripts call on such a file. It must end in a clean load or in the scripts' refusal, one sentence. Anything else is
bad: a traceback, a crash, more than --seconds, or more memory than the file's size and --megabytes. --verify must notice every changed shard.

Writes benchmark/results/fuzz.json: {"cases", "seed", "kinds": {kind: {"clean", "refused", "bad"}}, "defects": [{"case", "kind", "mutation",
"what"}], "cases_per_second", "slowest_seconds", "most_memory_mb"}.
"""

import contextlib
import copy
import functools
import io
import json
import math
import multiprocessing
import os
import pickletools
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from tensorboard.compat.proto.event_pb2 import Event

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import collect_expert_data as collect  # noqa: E402
import lapo_bc as bc  # noqa: E402
import lapo_decode as decode  # noqa: E402
import lapo_pretrain as pretrain  # noqa: E402

ENV_ID, SCALE, NUM_FRAMES = "coinrun", 1 / 16, 12  # tiny, so that random bytes often hit what matters
ARRAYS = {"frames": (np.uint8, (64, 64, 3)), "first": (bool, ()), "actions": (np.int8, ()), "rewards": (np.float32, ()), "returns": (np.float32, ())}
RUN_ARGS = pretrain.Args(env_id=ENV_ID, idm_scale=SCALE, fdm_width=2, vq_num_slots=2, vq_dim=2, vq_num_codes=4)  # 8 latents


INPUTS = {"--data-dir": "0"}


@dataclass
class Args:
    cases: int = 10_000
    """mutated files"""
    seed: int = 0
    """seed of the mutations; with the case's number it makes a case again"""
    only: int | None = None
    """run this case alone, and show its traceback"""
    seconds: float = 5.0
    """the longest that a case may take"""
    megabytes: int = 200
    """how much a case's memory may grow beyond the file's size"""
    out: str = str(ROOT / "benchmark" / "results" / "fuzz.json")
    """where the JSON goes"""


# ---- valid files


def pretrain_modules():
    """The modules of a tiny pretraining run, as its resume.pt holds them, after one step."""
    idm, vq, fdm = pretrain.IDM(SCALE, 8), pretrain.VQ(2, 2, 2, 4, 0.05, 0.999), pretrain.FDM(8, 2)
    params = [*idm.parameters(), *fdm.parameters()]
    optimizer = torch.optim.Adam(params, lr=1e-3, fused=True)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return {"idm": idm, "vq": vq, "fdm": fdm, "optimizer": optimizer}


def make_originals(folder):
    """A small valid file of every kind, {path: bytes}, paths relative to `folder`."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    meta = {"env_id": ENV_ID, "num_levels": 0, "start_level": 0}
    modules = pretrain_modules()
    states = {name: module.state_dict() for name, module in modules.items()}
    (folder / "run").mkdir()
    collect.save_checkpoint(
        folder / "expert.pt", {"stage": "collect_expert_data", **meta, "args": {"scale": SCALE}}, model=collect.Agent(SCALE).state_dict()
    )
    pretrain_meta = {"stage": "lapo_pretrain", **meta, "args": asdict(RUN_ARGS)}
    collect.save_checkpoint(folder / "pretrain.pt", {**pretrain_meta, "updates": 1}, **{k: states[k] for k in ("idm", "vq", "fdm")})
    progress = {"step": 1, "curve": [{"update": 1, "train/fdm_loss": 0.5}], "picture_seconds": 0.5, "inputs": INPUTS, "wall_seconds": 1.0}
    collect.save_checkpoint(folder / "run" / "resume.pt", {**pretrain_meta, **progress}, rng=pretrain.get_rng_state(rng), **states)
    collect.save_checkpoint(
        folder / "bc.pt",
        {"stage": "lapo_bc", **meta, "args": {"policy_scale": SCALE}, "pretrain_args": asdict(RUN_ARGS)},
        policy=bc.LatentPolicy(SCALE, 8).state_dict(), idm=states["idm"], latent_mean=torch.zeros(8), latent_std=torch.ones(8),
    )  # fmt: skip
    splits = {}
    for split in ("train", "test"):
        (folder / "data" / split).mkdir(parents=True)
        for name, (dtype, shape) in ARRAYS.items():
            np.save(folder / "data" / split / f"{name}.npy", rng.integers(2, size=(NUM_FRAMES, *shape)).astype(dtype))
        files = sorted((folder / "data" / split).glob("*.npy"))
        splits[split] = {"num_frames": NUM_FRAMES, "num_envs": 1, "checksums": {path.name: collect.checksum(path) for path in files}}
    demonstrator = {"return_mean": 1.0, "return_stderr": 0.1, "episodes": 10}
    dataset_meta = {"format_version": collect.FORMAT_VERSION, **meta, "splits": splits, "demonstrator": demonstrator, "args": {"seed": 1}}
    (folder / "data" / "meta.json").write_text(json.dumps(dataset_meta))
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- reading, as the scripts do


def use(network, path):
    """What comes next: the weights are laid out anew, and read."""
    state = network.state_dict()
    assert max(t.untyped_storage().nbytes() for t in state.values()) <= path.stat().st_size, "weights reach beyond the file"
    network.to(memory_format=torch.channels_last)
    return sum(float(t.sum()) for t in state.values())


def read_expert(folder):
    path = folder / "expert.pt"
    loaded = collect.load_checkpoint(path, "collect_expert_data", ENV_ID, "make", ("model",))
    scale = loaded["meta"]["args"].get("scale")
    use(collect.load_network(lambda: collect.Agent(scale), loaded["model"], path, "make"), path)


def read_pretrain(folder):
    path = folder / "pretrain.pt"
    loaded = bc.load_checkpoint(path, "lapo_pretrain", ENV_ID, "make", ("idm",))
    args = loaded["meta"]["args"]
    use(bc.load_network(lambda: bc.IDM(args["idm_scale"], bc.num_latents(args)), loaded["idm"], path, "make"), path)


def read_bc(folder):
    path = folder / "bc.pt"
    loaded = decode.load_checkpoint(path, "lapo_bc", ENV_ID, "make", ("policy", "idm", "latent_mean", "latent_std"))
    args, scale = loaded["meta"].get("pretrain_args"), loaded["meta"]["args"].get("policy_scale")
    idm = decode.load_network(lambda: decode.IDM(args["idm_scale"], decode.num_latents(args)), loaded["idm"], path, "make")
    size = idm.head.out_features
    policy = decode.load_network(lambda: decode.LatentPolicy(scale, size), loaded["policy"], path, "make")
    use(idm, path), use(policy, path)
    for vector in decode.load_vectors(loaded, ("latent_mean", "latent_std"), size, path, "make"):
        torch.zeros(size).copy_(vector)


def read_resume(folder):
    _, state = pretrain.start_run(folder / "run", RUN_ARGS, INPUTS)
    time.time() - state["meta"]["wall_seconds"]
    with pretrain.refusing_damage(folder / "run" / "resume.pt"):
        for name, module in pretrain_modules().items():
            module.load_state_dict(state[name])
        pretrain.set_rng_state(state["rng"], np.random.default_rng(0))
        return state["meta"]["curve"], state["meta"]["step"], float(state["meta"].get("picture_seconds", 0.0))


def read_shards(folder):
    meta = pretrain.load_meta(folder / "data", ENV_ID)
    frames, t = pretrain.load_frames(folder / "data", "train", meta)
    pretrain.get_windows(frames, t, torch.device("cpu"))
    actions = pretrain.load_actions(folder / "data", "train", meta)
    F.one_hot(torch.from_numpy(actions.astype(np.int64)), 15)


def read_meta(folder):
    meta = pretrain.load_meta(folder / "data", ENV_ID)
    pretrain.verify_dataset(folder / "data", meta)
    for split in ("train", "test"):
        pretrain.load_frames(folder / "data", split, meta)


def verify(folder):
    pretrain.verify_dataset(folder / "data", pretrain.load_meta(folder / "data", ENV_ID))


# ---- mutations: f(rng, bytes of a valid file, all valid files) -> bytes


def place(rng, n, edge=8192):
    """A position among n, more often near an end, where the structure is."""
    return min(max(0, rng.choice((rng.randrange(n), rng.randrange(min(n, edge)), n - 1 - rng.randrange(min(n, edge))))), n - 1)


def block(rng, n):
    """A random piece, start and end."""
    start = place(rng, n)
    return start, min(n, start + rng.choice((1, 2, 4, 16, 100, 5000)))


def flip(rng, content, _):
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        content[place(rng, len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def overwrite(rng, content, _):
    start, end = block(rng, len(content))
    return content[:start] + rng.choice((rng.randbytes(end - start), bytes(end - start), b"\xff" * (end - start))) + content[end:]


def truncate(rng, content, _):
    return content[: rng.choice((0, 1, place(rng, len(content)), len(content) - 1))]


def remove(rng, content, _):
    start, end = block(rng, len(content))
    return content[:start] + content[end:]


def insert(rng, content, _):
    at = place(rng, len(content))
    return content[:at] + rng.randbytes(rng.choice((1, 7, 64, 5000))) + content[at:]


def append(rng, content, _):
    return content + rng.choice((b"\x00", b"\n", rng.randbytes(1000), content))


def swap(rng, content, _):
    (a, b), (c, d) = sorted((block(rng, len(content)), block(rng, len(content))))
    b = min(b, c)
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def splice(rng, content, originals):
    other = originals[rng.choice(sorted(originals))]
    return content[: place(rng, len(content))] + other[place(rng, len(other)) :]


def garbage(rng, content, _):
    return rng.choice((b"", b"\x80\x02", b"PK\x03\x04", b"\x93NUMPY", b"{" * 10)) + rng.randbytes(rng.choice((0, 10, 1000)))


BYTES = (flip, overwrite, truncate, remove, insert, append, swap, splice, garbage)
DESCRS = ("|O", "<f8", ">u2", "<U5", "|V0", "|S0", "|V1000000000", "(3,)u1", "(0,)u1", "(2,)f,,", "x", "", ",", 5, None, [], [("a", "<u1")],
          [("a", "|O")], ("u1", 3), ("u1", (-1,)), {"a": 1}, "<M8[s]", "|b1", "|u1", "|i1")  # fmt: skip
SHAPES = ((10**18,), (2**62, 64, 64, 3), (2**200,), (-1,), (-12, 64, 64, 3), (), (0,), (0, 64, 64, 3), (12.0,), "x", None, [12], (True,), (1,) * 40,
          (11, 64, 64, 3), (12, 64, 64, 3, 1), (13,), (2**32, 2**32), (-(2**63),), (2**63, 0), (12, 64, 64, 3), (12,))  # fmt: skip
HEADERS = ("", "{", "(" * 5000, "[" * 9000 + "]" * 9000, "-" * 9000 + "1", "9" * 9000, "'''", "\x00", "{}", "[]", "{1: 2}", "\\\n", "   x\n  y\n z",
           "__import__('os').mkdir('boom')", "{'descr': '|u1', 'fortran_order': False, 'shape': (12L, 64L, 64L, 3L)}", "{'descr': '|u1',\n'shape': (",
           "{**1}", "{[]: 1}", "lambda: 0", "é" * 100, "{'descr': 1 + 2j, 'fortran_order': 1, 'shape': 1e999}")  # fmt: skip


def npy_header(rng, content, _):
    """An .npy whose header is another, with the old data."""
    size = struct.unpack("<H", content[8:10])[0]
    fields = {"descr": rng.choice(DESCRS), "shape": rng.choice(SHAPES), "fortran_order": rng.choice((True, 1, None, "x"))}
    header = eval(content[10 : 10 + size])  # our own file
    for name in rng.choice((["descr"], ["shape"], ["fortran_order"], list(fields))):
        header[name] = fields[name]
    if rng.random() < 0.1:
        header[rng.choice(("extra", 5))] = header.pop(rng.choice(list(header)))
    text = rng.choice(HEADERS) if rng.random() < 0.4 else repr(header)
    text = text.encode("latin1", "replace").ljust(rng.choice((size, 54, 118))) + b"\n" * rng.choice((0, 1))
    major = rng.choice((1, 1, 1, 1, 2, 3, 0, 9))
    length = rng.choice((len(text), len(text), len(text), 0, 1, 0xFFFF, 2**32 - 1))
    packed = struct.pack("<H", min(length, 0xFFFF)) if major < 2 else struct.pack("<I", length)
    return content[:6] + bytes((major, rng.choice((0, 0, 0, 1)))) + packed + text + content[10 + size :]


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


VALUES = (None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**30, -(10**4000), 0.5, 1e308, math.nan, math.inf, -math.inf, "", "x", "1",
          "a\nb", "a\u2028b",
          "\x00", "\x1b[2J", "\ud800", "../..", "x" * 100_000, [], [1], ["a"], {}, {"a": None}, [[1, 2], [3]], nested(200), nested(900))  # fmt: skip


def edit(rng, tree, values):
    """Replaces, drops, renames or adds something somewhere in nested dictionaries and lists."""
    while True:
        key = rng.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        if not isinstance(tree[key], dict | list) or not tree[key] or rng.random() < 0.15:
            break
        tree = tree[key]
    action = rng.random()
    if action < 0.15:
        del tree[key]
    elif action < 0.3 and isinstance(tree, dict):
        tree[rng.choice(("other", "", "a\nb", "../x", "\x00", "\ud800", "x" * 5000, 5))] = tree.pop(key) if action < 0.25 else rng.choice(values)
    else:
        tree[key] = rng.choice(values)


def json_edit(rng, content, _):
    tree = json.loads(content)
    for _ in range(rng.choice((1, 1, 1, 3))):
        edit(rng, tree, VALUES)
    return json.dumps(tree).encode()


def json_text(rng, content, _):
    """JSON that is hard to read, alone or as a value."""
    hard = rng.choice((b"[" * 100_000, b'{"a":' * 100_000, b"[" * 980 + b"]" * 980, b"[" * 5000 + b"]" * 5000, b"9" * 5000, b"1e999999999", b"NaN",
                       b"-Infinity", b"null", b'"\\ud800"', b'"\xff"', b"\xef\xbb\xbf{}", b"\x00", b"", b"1" * 100_000, b'""', b"{}"))  # fmt: skip
    where = [key for key in (b'"num_frames": 12', b'"format_version": 1', b'"num_levels": 0', b'"env_id": "coinrun"') if key in content]
    key = rng.choice(where)
    return rng.choice((hard, content.replace(key, key.split(b":")[0] + b": " + hard, 1), content.replace(key, key + b", " + key), content + hard))


ARGS = ({"idm_scale": 1e9}, {"idm_scale": 1e5}, {"idm_scale": -1}, {"idm_scale": 0}, {"idm_scale": math.nan}, {"idm_scale": math.inf},
        {"idm_scale": "x"},
        {"idm_scale": "1"}, {"idm_scale": None}, {"idm_scale": True}, {"idm_scale": [1]}, {"idm_scale": 2**70}, {"vq_dim": 2**62}, {"vq_dim": -2},
        {"vq_dim": 0}, {"vq_dim": 10**4000}, {"vq_dim": 2.0}, {"vq_dim": "2"}, {"vq_num_codebooks": [0], "vq_num_slots": 2**27, "vq_dim": 1},
        {"vq_num_codebooks": "a", "vq_num_slots": 2**30, "vq_dim": 1}, {"vq_num_codebooks": -2, "vq_num_slots": -2}, {"scale": 1e9}, {"scale": "x"},
        {"scale": 0}, {"scale": 1e5}, {"scale": None}, {"policy_scale": 1e9}, {"policy_scale": -1}, {"policy_scale": ()},
        {"policy_scale": 1e-9})  # fmt: skip
METAS = ("format_version", "stage", "env_id", "num_levels", "start_level", "args", "pretrain_args", "step", "wall_seconds", "curve", "inputs")


@functools.cache
def tensor_values():
    sparse = torch.ones(8).to_sparse()
    return (torch.zeros(()), torch.zeros(3), torch.zeros(8, dtype=torch.float64), torch.ones(1).expand(8), torch.full((8,), math.nan), sparse,
            torch.zeros(8, dtype=torch.complex64), torch.zeros(8, dtype=torch.int8), torch.ones(3, dtype=torch.bool), torch.zeros(8, device="meta"),
            torch.quantize_per_tensor(torch.ones(8), 0.1, 0, torch.quint8), torch.zeros(8, requires_grad=True), torch.nn.Parameter(torch.zeros(8)),
            torch.zeros(0), torch.zeros(8, dtype=torch.bfloat16), b"bytes", (1, 2), ())  # fmt: skip


def saved(tree):
    out = io.BytesIO()
    torch.save(tree, out)
    return out.getvalue()


@functools.cache
def unpacked(content):
    return torch.load(io.BytesIO(content), weights_only=True)


def tree_edit(rng, content, _):
    """A checkpoint with something else somewhere."""
    tree = copy.deepcopy(unpacked(content))
    for _ in range(rng.choice((1, 1, 3))):
        edit(rng, tree, VALUES[:-1] + tensor_values())
    return saved(tree)


def meta_edit(rng, content, _):
    """A checkpoint whose meta misleads."""
    tree = {**unpacked(content)}
    meta = tree["meta"] = copy.deepcopy(tree["meta"])
    if rng.random() < 0.7:
        update = rng.choice(ARGS)
        for name in ("args", "pretrain_args"):
            if name in meta:
                meta[name] |= update
    else:
        meta[rng.choice(METAS)] = rng.choice(VALUES[:-1] + tensor_values())
    if rng.random() < 0.1:
        tree["meta"] = rng.choice((list(meta.items()), None, [meta], "meta", torch.zeros(3), {}))
    return saved(tree)


def weight_edit(rng, content, _):
    """A checkpoint with a tensor of the right shape but another kind."""
    tree = copy.deepcopy(unpacked(content))
    state = tree[rng.choice([name for name in tree if isinstance(tree[name], dict) and name not in ("meta", "rng", "optimizer")])]
    name = rng.choice(list(state))
    kinds = (torch.Tensor.to_sparse, torch.Tensor.double, torch.Tensor.bool, lambda t: t.to("meta"), lambda t: t.flatten(), lambda t: t[None],
             lambda t: torch.zeros(()).expand(t.shape), lambda t: t.mT if t.dim() > 1 else t, lambda t: t.to(torch.complex64), lambda t: t.tolist(),
             lambda t: t * math.nan, lambda t: t.half(), lambda t: torch.nn.Parameter(t.float()))  # fmt: skip
    state[name] = rng.choice(kinds)(state[name])
    return saved(tree)


def rezip(content, changes, compression=zipfile.ZIP_STORED):
    """The same archive with other bytes in some records (None: without it). Names are given without their folder."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist():
            data = changes.get(name.split("/", 1)[1], old.read(name))
            if data is not None:
                new.writestr(name, data)
    return out.getvalue()


@functools.cache
def records(content):
    """{record: size} of an archive."""
    with zipfile.ZipFile(io.BytesIO(content)) as z:
        return {info.filename.split("/", 1)[1]: info.file_size for info in z.infolist()}


@functools.cache
def pickled(content):
    """data.pkl of a checkpoint, and where in it which integers stand."""
    with zipfile.ZipFile(io.BytesIO(content)) as z:
        data = z.read(next(name for name in z.namelist() if name.endswith("/data.pkl")))
    ops = [(op.name, value, at) for op, value, at in pickletools.genops(data)]
    ends = [at for _, _, at in ops[1:]] + [len(data)]
    return data, [(value, at, end) for (name, value, at), end in zip(ops, ends) if name in ("BININT", "BININT1", "BININT2", "LONG1")]


def pickle_sizes(rng, content, _):
    """Other integers in the pickle: sizes, strides and offsets of tensors, numbers of bytes of their storage."""
    data, integers = pickled(content)
    for value, start, end in sorted(rng.sample(integers, rng.choice((1, 1, 2))), key=lambda i: -i[1]):
        new = rng.choice((-1, 0, 1, value + 1, value * 2, value * 1000, 2**31 - 1, -(2**31), 2**40, 2**62))
        op = b"J" + struct.pack("<i", new) if -(2**31) <= new < 2**31 else b"\x8a\x08" + struct.pack("<q", new)
        data = data[:start] + op + data[end:]
    return rezip(content, {"data.pkl": data})


CODE = (b"cposix\nsystem\n(Vmkdir boom\ntR.", b"cos\nsystem\n(Vmkdir boom\ntR.", b"cbuiltins\neval\n(V__import__('os').mkdir('boom')\ntR.",
        b"cbuiltins\ngetattr\n(cos\npath\nVmkdir\ntR.", b"ctorch\nload\n(Vexpert.pt\ntR.", b"ctorch.hub\nload\n(Vx\nVy\ntR.",
        b"cos\nmkdir\n(Vboom\ntR.",
        b"(Vboom\nios\nmkdir\n.", b"cnumpy\nload\n(Vx.npy\ntR.", b"ctorch._utils\n_rebuild_tensor_v2\n(NI0\n(I9\nt(I1\nttR.", b"N.", b".",
        b"]" * 100_000 + b".",
        b"(" * 100_000, b"0" * 10, b"\x80\x09.", b"\x8b\xff\xff\xff\x7f.", b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", b"T\xff\xff\xff\x7f.",
        b"r\xff\xff\xff\x7f.", b"I" + b"9" * 100_000 + b"\n.", b"ccollections\nOrderedDict\n(]" + b"2" * 1000 + b"tR.",
        b"cbuiltins\nbytearray\n(I1000000000\ntR.",
        b"ctorch\nFloatStorage\n(I250000000\ntR.", b"ctorch\nSize\n(](I1\nI2\netR.", b"ctorch\ndevice\n(Vcuda\ntR.",
        b"}Vmeta\n}Vformat_version\n" + b"]" * 100_000 + b"a" * 99_999 + b"ss.")  # fmt: skip


def pickle_code(rng, content, _):
    """A pickle that would run code, take memory or never end, alone or within the checkpoint."""
    code = rng.choice(CODE)
    data, _ = pickled(content)
    return rng.choice(
        (code, b"\x80\x02" + code, rezip(content, {"data.pkl": code}), rezip(content, {"data.pkl": data[:2] + code[:-1] + b"0" + data[2:]}))
    )


def zip_record(rng, content, _):
    """A record dropped, cut, longer, packed or another's."""
    name, other = rng.choice(list(records(content))), rng.choice(list(records(content)))
    with zipfile.ZipFile(io.BytesIO(content)) as z:
        folder = z.namelist()[0].split("/")[0]
        data, others = z.read(f"{folder}/{name}"), z.read(f"{folder}/{other}")
    change = rng.choice((None, b"", data[: len(data) // 2], data[:-1], data + b"\x00", others, data * 2))
    return rezip(
        content, rng.choice(({name: change}, {})), rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    )


@functools.cache
def packed_zeros(megabytes):
    """(zeros deflated, their CRC)."""
    packer, crc = zlib.compressobj(9, zlib.DEFLATED, -15), 0
    piece = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    for _ in range(megabytes):
        crc = zlib.crc32(bytes(2**20), crc)
    return piece * megabytes + packer.flush(), crc


def zip_bomb(rng, content, _):
    """A record of a gigabyte, deflated to a megabyte; or one that only says that it has as much."""
    name, size = rng.choice([*records(content), "data.pkl", "data/0"]), 2**30
    packed, crc = packed_zeros(size >> 20) if rng.random() < 0.7 else (b"\x00" * 100, 0)
    method = 8 if crc else rng.choice((0, 8))
    content = bytearray(rezip(content, {name: packed}))
    with zipfile.ZipFile(io.BytesIO(content)) as z:
        info, at = next(i for i in z.infolist() if i.filename.split("/", 1)[1] == name), z.start_dir
    struct.pack_into("<H", content, info.header_offset + 8, method)
    struct.pack_into("<I", content, info.header_offset + 14, crc)
    struct.pack_into("<I", content, info.header_offset + 22, size)
    while struct.unpack_from("<I", content, at + 42)[0] != info.header_offset:  # the record's place in the directory
        at += 46 + sum(struct.unpack_from("<HHH", content, at + 28))
    struct.pack_into("<H", content, at + 10, method)
    struct.pack_into("<I", content, at + 16, crc)
    struct.pack_into("<I", content, at + 24, size)
    return bytes(content)


def legacy(rng, content, _):
    """The format of old torch versions, whole or damaged."""
    out = io.BytesIO()
    torch.save(unpacked(content), out, _use_new_zipfile_serialization=False)
    return rng.choice(BYTES)(rng, out.getvalue(), {"content": content})


CHECKPOINT = (*BYTES, tree_edit, meta_edit, meta_edit, weight_edit, pickle_sizes, pickle_sizes, pickle_code, zip_record, zip_bomb, legacy)
SHARD = (*BYTES, npy_header, npy_header, npy_header, npy_header)
KINDS = {  # kind: (file, what reads it, mutations)
    "demonstrator": (Path("expert.pt"), read_expert, CHECKPOINT),
    "pretraining checkpoint": (Path("pretrain.pt"), read_pretrain, CHECKPOINT),
    "cloning checkpoint": (Path("bc.pt"), read_bc, CHECKPOINT),
    "state to resume from": (Path("run/resume.pt"), read_resume, CHECKPOINT),
    "frames": (Path("data/train/frames.npy"), read_shards, SHARD),
    "first": (Path("data/train/first.npy"), read_shards, SHARD),
    "actions": (Path("data/train/actions.npy"), read_shards, SHARD),
    "meta.json": (Path("data/meta.json"), read_meta, (*BYTES, *[json_edit] * 9, *[json_text] * 5)),
}


# ---- running


def plan(case):
    """(kind, mutation) of a case, in turn."""
    kind = list(KINDS)[case % len(KINDS)]
    mutations = KINDS[kind][2]
    return kind, mutations[case // len(KINDS) % len(mutations)]


def memory_mb(field):
    """VmRSS or VmHWM (the peak since it was reset) of this process; 0 where there is no /proc."""
    try:
        return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return 0.0


def attempt(read, folder):
    """(clean, refused or bad, what happened) of reading."""
    try:
        read(folder)
    except SystemExit as e:
        good = isinstance(e.code, str) and e.code.startswith("error: ") and len(e.code.splitlines()) == 1 and len(e.code) < 10_000
        return ("refused", e.code) if good else ("bad", f"exit with {str(e.code)[:200]!r}, {len(str(e.code))} characters")
    except BaseException as e:
        where = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(e.__traceback__) if str(ROOT) in f.filename]
        return "bad", f"{type(e).__name__}: {str(e)[:200]} at {' '.join(where[-2:])}"
    return "clean", ""


class LogWriter:
    """Stands in for SummaryWriter: makes no files, but has its limits."""

    def __init__(self, _, purge_step=None):
        Event(step=purge_step)

    def add_text(self, *_):
        pass


def run_case(folder, originals, seed, case, megabytes):
    """{"outcome", "what", "growth"} of a case."""
    kind, mutation = plan(case)
    path, read, _ = KINDS[kind]
    content = mutation(random.Random(f"{seed} {case}"), originals[path], originals)
    (folder / path).write_bytes(content)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = memory_mb("VmRSS")
    outcome, what = attempt(read, folder)
    growth = memory_mb("VmHWM") - before
    if outcome != "bad" and mutation not in (json_edit, json_text) and path.suffix == ".npy" and content != originals[path]:
        if attempt(verify, folder)[0] != "refused":
            outcome, what = "bad", "--verify did not notice the change"
    if growth > len(content) / 2**20 + megabytes:
        outcome, what = "bad", f"{growth:.0f} MB of memory for a file of {len(content) / 2**20:.1f} MB ({outcome}: {what})"
    if Path("boom").exists():
        Path("boom").rmdir()
        outcome, what = "bad", "ran code from the file"
    for module in (collect, bc, decode, pretrain):
        for lock in module.LOCKS:
            lock.close()
        module.LOCKS.clear()
    (folder / path).write_bytes(originals[path])
    return {"outcome": outcome, "what": what.replace(str(folder), "FOLDER")[:500], "growth": growth}


@contextlib.contextmanager
def quietly():
    with mock.patch.object(pretrain, "SummaryWriter", LogWriter), warnings.catch_warnings(), open(os.devnull, "w") as null:
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(null):
            yield


def work(pipe, folder, originals, seed, cases, megabytes):
    """The child: runs cases and tells the parent of each."""
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a crash in torch speaks there
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**32, resource.RLIM_INFINITY))  # so that a bad case does not take the machine with it
    for path, content in originals.items():  # whatever a case before a crash left
        (folder / path).write_bytes(content)
    with quietly():
        for case in cases:
            pipe.send(run_case(folder, originals, seed, case, megabytes))


def fuzz(cases, seed=0, seconds=5.0, megabytes=200):
    """Runs so many cases, in a child process that is replaced when it crashes or hangs; returns what goes into the JSON."""
    cases = range(cases) if isinstance(cases, int) else cases
    context, start_time, done, slowest, most = multiprocessing.get_context("fork"), time.time(), 0, 0.0, 0.0
    counts, defects = {kind: Counter(clean=0, refused=0, bad=0) for kind in KINDS}, []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve()
        originals = make_originals(folder)
        while done < len(cases):
            pipe, to_parent = context.Pipe(duplex=False)
            child = context.Process(target=work, args=(to_parent, folder, originals, seed, cases[done:], megabytes), daemon=True)
            child.start()
            to_parent.close()
            alive, grace = True, 30.0  # the child's start is not the case's
            while alive and done < len(cases):
                began = time.time()
                try:
                    result = pipe.recv() if pipe.poll(seconds + grace) else {"outcome": "bad", "what": f"took more than {seconds} s", "growth": 0}
                    alive = not result["what"].startswith("took more")
                except EOFError:
                    child.join()
                    result, alive = {"outcome": "bad", "what": f"the process died with exit code {child.exitcode}", "growth": 0}, False
                took = time.time() - began
                if took > seconds + grace / 2 and alive:
                    result |= {"outcome": "bad", "what": f"took {took:.1f} s"}
                slowest, most = max(slowest, 0 if grace else took), max(most, result["growth"])
                kind, mutation = plan(cases[done])
                counts[kind][result["outcome"]] += 1
                if result["outcome"] == "bad":
                    defects.append({"case": cases[done], "kind": kind, "mutation": mutation.__name__, "what": result["what"]})
                done, grace = done + 1, 0.0
            child.kill()
            child.join()
            pipe.close()
    return {
        "cases": done, "seed": seed, "kinds": {kind: dict(count) for kind, count in counts.items()}, "defects": defects,
        "cases_per_second": round(done / (time.time() - start_time), 1), "slowest_seconds": round(slowest, 2), "most_memory_mb": round(most, 1),
    }  # fmt: skip


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    if args.only is not None:
        with tempfile.TemporaryDirectory() as folder, quietly():
            folder = Path(folder).resolve()
            originals, (kind, mutation) = make_originals(folder), plan(args.only)
            path, read, _ = KINDS[kind]
            (folder / path).write_bytes(mutation(random.Random(f"{args.seed} {args.only}"), originals[path], originals))
            os.chdir(folder)
            print(f"{kind}, {mutation.__name__}", file=sys.stderr)
            read(folder)
        sys.exit()
    results = fuzz(args.cases, args.seed, args.seconds, args.megabytes)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(results, indent=2) + "\n")
    print(f"{'kind':24s} {'clean':>8s} {'refused':>8s} {'bad':>8s}")
    for kind, count in results["kinds"].items():
        print(f"{kind:24s} {count['clean']:8d} {count['refused']:8d} {count['bad']:8d}")
    for d in results["defects"][:20]:
        print(f"case {d['case']}, {d['kind']}, {d['mutation']}: {d['what']}")
    print(f"{results['cases']} cases, {results['cases_per_second']} a second, {len(results['defects'])} bad; wrote {args.out}")
    sys.exit(1 if results["defects"] else 0)
