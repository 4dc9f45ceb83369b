"""Files of torch.save come back number for number in both layouts; nothing else is built, whatever a file asks for."""

import argparse
import collections
import datetime
import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import Call, refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyvit.checkpoints.checkpoint import CheckpointError
from tinyvit.checkpoints.loading import load_model
from tinyvit.checkpoints.readers.weight_files import read_weights

LAYOUTS = ["zip", "legacy"]
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip


def save(content, path, layout="zip"):
    torch.save(content, path, _use_new_zipfile_serialization=layout == "zip")
    return path


def numbers(tensor):
    """What the reader is to give for a tensor."""
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def assert_reads(path, expected):
    found = read_weights(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == numbers(tensor).dtype, name
        np.testing.assert_array_equal(found[name], numbers(tensor), err_msg=name)
        assert found[name].flags.writeable and found[name].flags.c_contiguous and found[name].flags.aligned, name


# --- tensors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_dtype(tmp_path, layout):
    values = torch.tensor([[0, 1, 2], [100, 7, 3]])
    content = {str(dtype): values.to(dtype) for dtype in DTYPES}
    content |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "odd": torch.tensor([-0.0, np.inf, np.nan])}
    assert_reads(save(content, tmp_path / "a.pth", layout), content)


@st.composite
def views(draw):
    """A tensor that is some part of a storage, with any strides (also overlapping or 0)."""
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    strides = tuple(draw(st.integers(0, 7)) for _ in shape)
    offset = draw(st.integers(0, 5))
    needed = offset + 1 + sum(max(n - 1, 0) * s for n, s in zip(shape, strides, strict=True))
    storage = torch.arange(needed + draw(st.integers(0, 3)), dtype=draw(st.sampled_from(DTYPES[:6])))
    return storage.as_strided(shape, strides, offset)


@settings(max_examples=60)
@given(tensor=views(), layout=st.sampled_from(LAYOUTS))
def test_any_strides_and_offset(tmp_path_factory, tensor, layout):
    assert_reads(save({"x": tensor}, tmp_path_factory.getbasetemp() / f"view-{os.getpid()}.pth", layout), {"x": tensor})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_that_share_a_storage_come_apart(tmp_path, layout):
    flat = torch.arange(24.0)
    content = {"a": flat[:12].view(3, 4), "b": flat[12:].view(4, 3).T, "whole": flat, "again": flat}
    found = read_weights(save(content, tmp_path / "a.pth", layout))
    for name, array in found.items():
        array += 1.0
        np.testing.assert_array_equal(array, numbers(content[name]) + 1.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_state_dict_with_parameters_and_metadata(tmp_path, layout):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    state = model.state_dict(keep_vars=True)  # an OrderedDict with attributes, of Parameters
    assert isinstance(state["0.weight"], torch.nn.Parameter) and state._metadata
    assert_reads(save(state, tmp_path / "a.pth", layout), state)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("nest", [("model",), ("state_dict",), ("model_ema",), ("model", "state_dict")])
def test_weights_within_a_training_checkpoint(tmp_path, layout, nest):
    weights = {"w": torch.randn(2, 3)}
    content = {f"module.{name}": tensor for name, tensor in weights.items()}
    for name in reversed(nest):
        parameter = torch.nn.Parameter(torch.zeros(3))
        parameter.grad = torch.ones(3)
        optimizer = torch.optim.AdamW([parameter])
        optimizer.step()
        rest = {"epoch": 3, "optimizer": optimizer.state_dict(), "best": np.float64(0.5), "size": torch.Size([2])}
        content = {name: content, "lr": [0.1, (1, None)], "device": torch.device("cpu"), "kind": torch.bfloat16, **rest}
    assert_reads(save(content, tmp_path / "a.pth", layout), weights)


def test_a_state_dict_that_python_2_wrote(tmp_path):
    """Its strings are bytes, and its OrderedDict is made of a list of pairs."""
    path = tmp_path / "a.pth"
    path.write_bytes(stored((0, (2, 2), (2, 1), False, HOOKS)))
    with zipfile.ZipFile(path) as archive:
        pickled, data = archive.read("a/data.pkl"), archive.read("a/data/0")
    start, _, tensor = pickled.partition(b"X\x01\x00\x00\x00x")
    assert start == b"\x80\x02}q\x00" and tensor.endswith(b"s.")
    start = b"\x80\x02ccollections\nOrderedDict\n]](U\x01x"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", start + tensor.removesuffix(b"s.") + b"ea\x85R.")
        archive.writestr("a/data/0", data)
    assert read_weights(path)["x"].tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_timms_order_of_preference(tmp_path):
    content = {name: {"w": torch.full((1,), i)} for i, name in enumerate(["state_dict_ema", "state_dict", "model"])}
    assert read_weights(save(content, tmp_path / "a.pth"))["w"] == 0
    del content["state_dict_ema"]
    assert read_weights(save(content, tmp_path / "a.pth"))["w"] == 1


def test_files_without_checksums(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = save({"x": torch.arange(5)}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_reads(path, {"x": torch.arange(5)})


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("place", ["content", "weights", "beside", "key"])
def test_a_call_is_refused_by_name_and_not_made(tmp_path, layout, place):
    marker = tmp_path / "ran"
    evil = Call(os.system, f"touch {marker}")
    content = {
        "content": evil,
        "weights": {"model": {"w": torch.zeros(2), "v": evil}},
        "beside": {"model": {"w": torch.zeros(2)}, "args": evil},
        "key": {(1, evil): torch.zeros(2)},
    }[place]
    message = refusal(save(content, tmp_path / "evil.pth", layout))
    assert "posix.system" in message or "nt.system" in message
    assert not marker.exists()
    pickle.loads(pickle.dumps(evil))
    assert marker.exists(), "the stream would have been harmless anyway"


@pytest.mark.parametrize("name", ["evil.pth", "evil.bin", "evil.safetensors", "evil.npz", "evil", "pytorch_model.bin"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_bare_pickle_runs_nothing_under_any_name(tmp_path, name, protocol):
    marker = tmp_path / "ran"
    (tmp_path / name).write_bytes(pickle.dumps({"w": Call(os.system, f"touch {marker}")}, protocol=protocol))
    refusal(tmp_path / name)
    refusal(tmp_path)
    assert not marker.exists()


def test_a_pickle_in_any_place_of_the_archive_runs_nothing(tmp_path):
    marker = tmp_path / "ran"
    evil = pickle.dumps(Call(os.system, f"touch {marker}"))
    whole = save({"x": torch.zeros(2)}, tmp_path / "whole.pth")
    path = tmp_path / "evil.pth"
    with zipfile.ZipFile(whole) as source:
        for replaced in source.namelist():
            with zipfile.ZipFile(path, "w") as archive:
                for name in source.namelist():
                    archive.writestr(name, evil if name == replaced else source.read(name))
            refusal(path)
    np.savez(tmp_path / "evil.npz", w=np.array([Call(os.system, f"touch {marker}")], dtype=object))
    assert "allow_pickle" in refusal(tmp_path / "evil.npz")
    assert not marker.exists()


class Settings:
    """A class of a user's own, whose source the reader of a checkpoint does not have."""

    def __init__(self, **values):
        self.__dict__.update(values)


OTHERS = [
    (lambda: argparse.Namespace(lr=0.1, names=["a"]), "argparse.Namespace"),
    (lambda: Settings(lr=0.1), "Settings"),
    (lambda: Path("x"), "pathlib."),
    (lambda: torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    (lambda: collections.Counter("aa"), "collections.Counter"),
    (lambda: collections.defaultdict(list, a=[1]), "collections.defaultdict"),
    (lambda: datetime.datetime(2024, 1, 1), "datetime.datetime"),
    (lambda: {1, 2}, "a list"),
    (lambda: 1 + 2j, "builtin"),
    (lambda: torch.zeros(2).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
    (lambda: torch.zeros(2, dtype=torch.float8_e4m3fn), "torch.float8_e4m3fn"),
    (lambda: torch.zeros(2, dtype=torch.complex64), "torch.ComplexFloatStorage"),
]


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("thing", "name"), OTHERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_other_objects_have_stand_ins_beside_the_weights_and_are_refused_among_them(
    tmp_path, layout, thing, name, protocol
):
    def save(content):
        path = tmp_path / "a.pth"
        torch.save(content, path, _use_new_zipfile_serialization=layout == "zip", pickle_protocol=protocol)
        return path

    if layout == "legacy" and "Complex" in name:  # the size of its elements is not known, so nothing behind it is found
        assert name in refusal(save({"model": {}, "x": thing()}))
        return
    weights = {"w": torch.arange(3)}
    assert_reads(save({"model": weights, "x": thing(), "more": [thing()]}), weights)
    message = refusal(save({"model": weights | {"v": thing()}}))
    assert "v cannot be read: expected a tensor, found " in message and name in message


def test_things_among_the_weights_that_are_no_tensors(tmp_path):
    assert "epoch cannot be read: expected a tensor, found a int" in refusal(save({"epoch": 1}, tmp_path / "a.pth"))
    assert "holds a list, expected a state dict" in refusal(save([torch.zeros(2)], tmp_path / "b.pth"))
    whole = refusal(save(torch.nn.Linear(2, 2), tmp_path / "c.pth"))
    assert whole.endswith("Linear, expected a state dict, as torch.save(model.state_dict(), path) writes it")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_and_other_archives(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "a.pt")
    assert "TorchScript" in refusal(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "b.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "holds no data.pkl" in refusal(tmp_path / "b.pth")
    with zipfile.ZipFile(tmp_path / "c.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("c/data.pkl", pickle.dumps({}))
    assert "compressed" in refusal(tmp_path / "c.pth")


# --- damage -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=LAYOUTS)
def whole(request):
    content = io.BytesIO()
    tensors = {"a.weight": torch.arange(6.0).view(2, 3).T, "b": torch.zeros(2, dtype=torch.bfloat16)}
    torch.save({"model": tensors, "epoch": 3}, content, _use_new_zipfile_serialization=request.param == "zip")
    return content.getvalue()


def test_a_file_cut_short_anywhere_is_refused(whole, tmp_path):
    path = tmp_path / "a.pth"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"\A[^\n]*\Z"):
            load_model(path)


def test_damaged_numbers_are_noticed(tmp_path):
    path = save({"x": torch.full((50,), 1.5)}, tmp_path / "a.pth")
    content = path.read_bytes()
    place = content.index(np.float32(1.5).tobytes() * 50)
    path.write_bytes(content[: place + 9] + b"\x01" + content[place + 10 :])
    assert "x cannot be read: Bad CRC-32 for file 'a/data/0'" in refusal(path)


def stored(tensor_arguments, data=bytes(16), view=()):
    """An archive with one tensor `x`, rebuilt from these arguments after its storage of 4 floats, or a view of that."""

    class Storage:
        pass

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Storage(), *tensor_arguments)

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            return ("storage", torch.FloatStorage, "0", "cpu", 4, *view) if isinstance(thing, Storage) else None

    stream = io.BytesIO()
    Pickler(stream, 2).dump({"x": Tensor()})
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("a/data.pkl", stream.getvalue())
        archive.writestr("a/data/0", data)
    return content.getvalue()


HOOKS = collections.OrderedDict()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((0, (5,), (1,), False, HOOKS), "ends at byte 20 of a storage of 16"),
        ((1, (4,), (1,), False, HOOKS), "ends at byte 20 of a storage of 16"),
        ((0, (2,), (9,), False, HOOKS), "ends at byte 40 of a storage of 16"),
        ((-1, (2,), (1,), False, HOOKS), "shape is damaged"),
        ((0, (-2,), (1,), False, HOOKS), "shape is damaged"),
        ((0, (2,), (-1,), False, HOOKS), "shape is damaged"),
        ((0, (2, 2), (1,), False, HOOKS), "shape is damaged"),
        ((0, (1 << 40,), (0,), False, HOOKS), "repeat"),
        ((0, (2.5,), (1,), False, HOOKS), ""),
        ((0, "no", None, False, HOOKS), ""),
        ((0, (2,), (1,), False, HOOKS, {"conj": True}), "conjugated"),
    ],
)
def test_tensors_that_reach_beyond_their_storage(tmp_path, arguments, problem):
    path = tmp_path / "a.pth"
    path.write_bytes(stored((0, (2, 2), (2, 1), False, HOOKS)))
    assert read_weights(path)["x"].tolist() == [[0.0, 0.0], [0.0, 0.0]], "the fixture itself must be readable"
    path.write_bytes(stored(arguments))
    assert problem in refusal(path)


def test_a_view_of_a_storage_begins_where_it_says(tmp_path):
    """As in old files."""
    data = np.arange(4, dtype="<f4").tobytes()
    (tmp_path / "a.pth").write_bytes(stored((1, (2,), (1,), False, HOOKS), data, [("view", 1, 3)]))
    assert read_weights(tmp_path / "a.pth")["x"].tolist() == [2.0, 3.0]


def test_only_the_weights_are_read(tmp_path, monkeypatch):
    path = save({"model": {"w": torch.ones(3)}, "optimizer": {"state": torch.ones(1000)}}, tmp_path / "a.pth")
    names, read = [], zipfile.ZipFile.read
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda self, m, *a: names.append(m.filename) or read(self, m, *a))
    assert read_weights(path)["w"].tolist() == [1.0, 1.0, 1.0]
    assert [name for name in names if "/data/" in name] == ["a/data/0"]


def test_views_of_one_storage_read_it_once(tmp_path, monkeypatch):
    flat = torch.arange(1000.0)
    content = {f"w{i}": flat[i : i + 1] for i in range(1000)}
    path = save(content, tmp_path / "a.pth")
    read = zipfile.ZipFile.read
    names = []
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda self, m, *a: names.append(m.filename) or read(self, m, *a))
    assert_reads(path, content)
    assert names.count("a/data/0") == 1
