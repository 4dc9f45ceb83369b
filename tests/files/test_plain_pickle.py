"""What the reader of pickles refuses by itself. That it reads plain values is tested with the files that hold them."""

import io
import pickle

import pytest

from tinyvit.files import plain_pickle
from tinyvit.files.plain_pickle import PickleError, load_pickle

OTHERS = ["INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"]


@pytest.mark.parametrize("opcode", [*(getattr(pickle, name) for name in OTHERS), b"\xff", b"\x00"])
def test_opcodes_that_are_not_in_the_list(opcode):
    with pytest.raises(PickleError, match="has an opcode that is not read"):
        load_pickle(io.BytesIO(b"\x80\x02N" + opcode + b"cbuiltins\nobject\n."))


def test_all_other_opcodes_are_in_the_list():
    others = {getattr(pickle, name)[0] for name in OTHERS}
    listed = {getattr(pickle, name)[0] for name in plain_pickle.OPCODES.split()}
    assert listed.isdisjoint(others) and listed | others == set(pickle._Unpickler.dispatch)


@pytest.mark.parametrize("stream", [b"", b"\x80\x02", b"\x80\x02.", b"\x80\x02N0.", b"\x80\x02t.", b"\x80\x02Na."])
def test_a_stream_that_ends_early_or_takes_too_much(stream):
    with pytest.raises(PickleError, match="cut short, or takes more values than it gives"):
        load_pickle(io.BytesIO(stream))


def test_a_claimed_size_reserves_no_memory():
    with pytest.raises(PickleError):
        load_pickle(io.BytesIO(b"\x80\x05" + pickle.BYTEARRAY8 + (1 << 50).to_bytes(8, "little") + b"x."))


def test_long_streams(monkeypatch):
    stream = pickle.dumps(list(range(1000)))
    assert load_pickle(io.BytesIO(stream)) == list(range(1000))
    monkeypatch.setattr(plain_pickle, "MOST_READS", 1000)
    with pytest.raises(PickleError, match="or 1000 parts"):
        load_pickle(io.BytesIO(stream))
    monkeypatch.undo()
    monkeypatch.setattr(plain_pickle, "MOST_BYTES", 1000)
    with pytest.raises(PickleError, match="more than 1000 bytes"):
        load_pickle(io.BytesIO(stream))
