"""Small files that ask a careless reader for much memory or time."""

import json
import pickle
import struct
import zipfile

import numpy as np
from safetensors.numpy import save_file

BIG = 3 * 10**9


def nested(opcodes, count):
    """A pickled dictionary whose one key is nested `count` deep."""
    return b"\x80\x02})" + opcodes * count + b"K\x01s."


def value(opcodes):
    """A pickled dictionary with one value, the result of `opcodes`."""
    return b"\x80\x02}U\x01w" + opcodes + b"s."


SHARED = b")q\x00" + b"h\x00h\x00\x86q\x00" * 60  # a tuple of 2 ** 60 leaves, two of which are one object each
PICKLES = {
    "tuples": nested(b"\x85", 1_000_000),
    "tuples of 20,000": nested(b"\x85", 20_000),
    "tuples as a value": value(b")" + b"\x85" * 50_000),
    "lists": value(b"]" + b"]a" * 25_000),
    "lists in lists": value(b"]" * 25_000 + b"a" * 24_999),
    "dictionaries": value(b"}" + b"U\x01w}s" * 20_000),
    "shared key": b"\x80\x02}" + SHARED + b"K\x01s.",
    "shared value": value(SHARED),
    "shared array state": value(b"cnumpy.core.multiarray\n_reconstruct\n)R" + SHARED + b"b"),
    "bytearray": value(b"cbuiltins\nbytearray\n(J" + (2**31 - 1).to_bytes(4, "little") + b"tR"),
    "bytes": value(b"c__builtin__\nbytes\n(J" + (2**31 - 1).to_bytes(4, "little") + b"tR"),
    "encoded again and again": value(
        b"]c_codecs\nencode\nq\x00X" + (1 << 20).to_bytes(4, "little") + b"x" * (1 << 20) + b"U\x06latin1\x86q\x01"
        + b"(" + b"h\x00h\x01R" * 100_000 + b"e"
    ),
    "sets": value(
        b"c__builtin__\nset\nq\x00(" + b"K\x01" * 100_000 + b"l\x85q\x01(" + b"h\x00h\x01R" * 70_000 + b"l"
    ),
    "ordered dictionary again and again": value(
        b"ccollections\nOrderedDict\nq\x00(" + b"]U\x01aaK\x01a" * 50_000 + b"l\x85q\x01("
        + b"h\x00h\x01R" * 40_000 + b"l"
    ),
    "numbers as keys": b"\x80\x02}(" + b"".join(
        b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little", signed=True) + b"N" for k in range(30_000)
    ) + b"u.",
    "colliding keys": b"\x80\x02}(" + b"".join(
        b"\x8a\x08" + (k * (2**61 - 1) % 2**63).to_bytes(8, "little", signed=True) + b"N" for k in range(30_000)
    ) + b"u.",
    "long numbers as keys": b"\x80\x02}\x8b" + (1 << 20).to_bytes(4, "little") + b"\x01" * (1 << 20) + b"q\x00N"
    + b"sh\x00N" * 100_000 + b"s.",
    "memo": b"\x80\x02}r\xff\xff\xff\xff.",
    "long text": b"\x80\x04\x8d" + (1 << 60).to_bytes(8, "little") + b"x.",
    "wide text": value(b"X" + (1 << 24).to_bytes(4, "little") + "😀".encode() + b"x" * ((1 << 24) - 4)),
    "marks": b"\x80\x02" + b"(" * 50_000 + b".",
    "a line": b"\x80\x02I" + b"1" * 10**7 + b"\n.",
    "long name": b"\x80\x02c" + b"a" * 10**6 + b"\n" + b"b" * 10**6 + b"\n.",
    "array of 5,000 dimensions": value(
        b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01(" + b"\x8a\x08" + (2**62).to_bytes(8, "little") * 1
        + (b"\x8a\x08" + (2**62).to_bytes(8, "little")) * 4999 + b"tcnumpy\ndtype\n(U\x02f4K\x00K\x01tR\x89U\x00tb"
    ),
}  # fmt: skip


def storage(numel):
    return b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuJ" + struct.pack("<i", numel) + b"tQ"


def tensor(numel, shape, strides):
    numbers = (b"(" + b"".join(b"\x8a\x09" + n.to_bytes(9, "little") for n in part) + b"t" for part in (shape, strides))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(numel) + b"K\x00" + b"".join(numbers) + b"\x89}tR"


def tensors(count, *arguments):
    names = (b"U\x08" + f"w{i:07}".encode() + b"".join([tensor(*arguments)]) for i in range(count))
    return b"\x80\x02}(" + b"".join(names) + b"u."


TENSORS = {
    "strides of 0": tensors(50, 16, (1 << 22, 4), (0, 1)),
    "2,000 tensors of one storage": tensors(2000, 1 << 20, (1 << 20,), (1,)),
    "long reach": tensors(2000, 1 << 20, (2,), ((1 << 20) - 1,)),
    "shape of 5,000 numbers": tensors(1, 16, (2**62,) * 5000, (0,) * 5000),
    "empty shape": tensors(1, 16, (0, 2**60), (1, 1)),
    "large shape": tensors(1, 16, (2**40, 2**40), (0, 0)),
}


def torch_zip(path, data, numel=0):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", data)
        archive.writestr("a/version", "3\n")
        archive.writestr("a/data/0", bytes(4 * numel))


def npz(path, members, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def npy(shape_text, content=b""):
    header = ("{'descr': '<f4', 'fortran_order': False, 'shape': " + shape_text + ", }").encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


def safetensors_file(path, entries, content=b""):
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)


def write_torch(folder):
    for name, data in PICKLES.items():
        torch_zip(folder / f"{name}.pth", data)
    for name, data in TENSORS.items():
        torch_zip(folder / f"{name}.pth", data, 1 << 20)
    start = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    protocol, machine = pickle.dumps(1001, 2), pickle.dumps({"little_endian": True}, 2)
    plain = b"\x80\x02" + SHARED + b"."
    (folder / "shared protocol.pth").write_bytes(start + plain)
    (folder / "shared machine.pth").write_bytes(start + protocol + plain)
    (folder / "shared keys.pth").write_bytes(start + protocol + machine + pickle.dumps({}, 2) + plain)
    for name in ("tuples of 20,000", "shared key", "bytearray"):
        (folder / f"{name} legacy.pth").write_bytes(start + protocol + machine + PICKLES[name])
    with zipfile.ZipFile(folder / "many members.pth", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, 2))
        for i in range(8_000):
            archive.writestr(zipfile.ZipInfo(f"a/data/{i:01000}"), b"")


def write_npz(folder):
    npz(folder / "zeros.npz", {"w.npy": npy("(33554432,)", bytes(1 << 27))})
    npz(folder / "shape.npz", {"w.npy": npy("(" + "9," * 4900 + ")")})
    npz(folder / "shape of thousands.npz", {"w.npy": npy("(" + "1," * 4900 + ")", bytes(4))})
    npz(folder / "claimed.npz", {"w.npy": npy("(1000000000000,)", bytes(64))})
    npz(folder / "deep.npz", {"w.npy": npy("(" * 4000 + ")" * 4000)})
    npz(folder / "bz2.npz", {"w.npy": npy("(1048576,)", bytes(1 << 22))}, zipfile.ZIP_BZIP2)
    npz(folder / "lzma.npz", {"w.npy": npy("(1048576,)", bytes(1 << 22))}, zipfile.ZIP_LZMA)


def write_safetensors(folder):
    one = {"dtype": "F32", "shape": [1 << 20], "data_offsets": [0, 1 << 22]}
    safetensors_file(folder / "overlapping.safetensors", {f"w{i}": one for i in range(4000)}, bytes(1 << 22))
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    safetensors_file(folder / "empty tensors.safetensors", {f"w{i}": empty for i in range(200_000)})
    safetensors_file(folder / "empty.safetensors", {"w": empty | {"shape": [0, 1 << 62, 1 << 62]}})
    safetensors_file(folder / "dimensions.safetensors", {"w": empty | {"shape": [0] * 1_000_000}})
    (folder / "long header.safetensors").write_bytes((90_000_000).to_bytes(8, "little") + b"{" + b" " * 89_999_999)
    (folder / "deep header.safetensors").write_bytes((10**6).to_bytes(8, "little") + b'{"a":' * 200_000)


def weights_file(path, **extra):
    rng = np.random.default_rng(0)
    weights = {
        "cls_token": (1, 1, 8), "pos_embed": (1, 5, 8), "patch_embed.proj.weight": (8, 3, 4, 4),
        "blocks.0.mlp.fc1.weight": (32, 8), "norm.weight": (8,), "head.weight": (3, 8), **extra,
    }  # fmt: skip
    save_file({name: rng.random(shape, np.float32) for name, shape in weights.items()}, path)


def write_names(folder):
    """Names and shapes that describe huge models."""
    weights_file(folder / "block 999999999.safetensors", **{"blocks.999999999.norm1.weight": (8,)})
    weights_file(folder / "block of digits.safetensors", **{f"blocks.{'9' * 5000}.norm1.weight": (8,)})
    weights_file(folder / "stage.safetensors", **{"patch_embed.backbone.stages.999999999.blocks.0.conv1.weight": (8,)})
    weights_file(folder / "classes.safetensors", **{"head.weight": (8_000_000, 1)})
    weights_file(folder / "blocks.safetensors", **{f"blocks.{i}.norm1.weight": (1,) for i in range(90_000)})
    array = np.zeros((3_000_000, 1), np.float32)
    with open(folder / "stacked.npz", "wb") as file:
        np.savez(file, **{"embedding/kernel": array[:4], "Transformer/encoderblock/LayerNorm_0/scale": array})


def write_runs(folder):
    import tinyvit
    from tinyvit.checkpoints.checkpoint import describe
    from tinyvit.checkpoints.native_file import save
    from tinyvit.models.preprocessing import Preprocessing

    model = tinyvit.create_model("vit_nano_patch8_32", num_classes=3)
    about = describe(model.config, ("a", "b", "c"), Preprocessing((0.5,) * 3, (0.5,) * 3), {})
    for name, size in {
        "depth": 100_000, "embed_dim": 65536, "num_classes": 10**6, "reg_tokens": 60000, "representation_size": 65536,
        "mlp_ratio": 1e6, "patch_size": 65536, "image_size": 65536, "resnet_layers": [1000] * 4,
    }.items():  # fmt: skip
        save(folder / f"{name}.safetensors", model.state_dict(), about | {"config": about["config"] | {name: size}})
    names = [str(i) for i in range(600_000)]
    save(folder / "names.safetensors", model.state_dict(), about | {"class_names": names})
    save(folder / "long name.safetensors", model.state_dict(), about | {"class_names": ["x" * 5_000_000, "b", "c"]})
    deep = json.dumps(about)[:-1] + ', "x": ' + "[" * 100_000 + "]" * 100_000 + "}"
    from safetensors.numpy import save_file as write

    write(model.state_dict(), folder / "deep.safetensors", metadata={"tinyvit": deep})


def write_directories(folder):
    for name, (config, preprocessor) in {
        "deep": ("[" * 1_000_000, "{}"),
        "long": ('{"a": "' + "x" * 30_000_000 + '"}', "{}"),
        "objects": ("[" + "{}," * 2_500_000 + "{}]", "{}"),
        "depth": ('{"model_type": "vit", "num_hidden_layers": 10000}', "{}"),
        "labels": (json.dumps({"model_type": "vit", "id2label": {str(i): "x" for i in range(500_000)}}), "{}"),
        "crop": ('{"model_type": "vit"}', '{"size": 65536, "crop_size": 1, "do_center_crop": true}'),
        "number": ('{"model_type": "vit", "hidden_size": ' + "9" * 4000 + "}", "{}"),
    }.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(config)
        (folder / name / "preprocessor_config.json").write_text(preprocessor)
        save_file(
            {"vit.embeddings.patch_embeddings.projection.weight": np.zeros((8, 3, 4, 4), np.float32),
             "classifier.weight": np.zeros((3, 8), np.float32)}, folder / name / "model.safetensors",
        )  # fmt: skip
    (folder / "index").mkdir()
    places = {f"w{i}": f"{i}.safetensors" for i in range(50_000)}
    (folder / "index" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


CIFAR = {
    **{name: PICKLES[name] for name in ("tuples", "shared key", "shared value", "bytes", "encoded again and again")},
    "label names": b"\x80\x02}U\x0blabel_names](" + SHARED + b"es.",
    "labels": b"\x80\x02}U\x06labels](" + SHARED + b"es.",
}
MEASURE = """
import ctypes, re, sys, time, warnings
from pathlib import Path
import tinyvit, tinyvit.checkpoints
from tinyvit.data.sources.cifar import class_names
warnings.simplefilter("ignore")
def memory(name):
    return 1024 * int(re.search(name + r":\\s*(\\d+)", open("/proc/self/status").read())[1])
for path in map(Path, sys.argv[1:]):
    ctypes.CDLL(None).malloc_trim(0)  # else what others have freed would not count
    open("/proc/self/clear_refs", "w").write("5")
    before, started = memory("VmRSS"), time.process_time()
    try:
        class_names(path) if (path / "batches.meta").exists() else tinyvit.load_model(path)
        error = "none\\t"
    except Exception as problem:
        error = f"{type(problem).__name__}\\t{problem}"
    print(f"{time.process_time() - started:.2f}\\t{memory('VmHWM') - before}\\t{error}", flush=True)
"""


def write_cifar(folder):
    for name, data in CIFAR.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "batches.meta").write_bytes(data)


WRITERS = ((write_torch,), (write_npz, write_safetensors, write_names, write_runs, write_directories, write_cifar))
