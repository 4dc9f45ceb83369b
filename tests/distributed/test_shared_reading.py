"""Processes share the reading of a data set, and each has what one alone would have."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from running import make_images

from tinyvit.data import DataError, load_data
from tinyvit.data.sources import listing
from tinyvit.distributed import DistributedError, Group, processes
from tinyvit.training import run
from tinyvit.training.config import TrainConfig
from tinyvit.training.display import Display


class Thread(Group):
    """A process of a group that is a thread: what it exchanges goes through `table`, packed as between processes."""

    def __init__(self, rank, size, table):
        self.rank, self.size, self.local_rank, self.table, self.count = rank, size, rank, table, 0
        self.threads = 1

    def exchange(self, value, patience=None):
        row, self.count = self.table.setdefault(self.count, {}), self.count + 1
        with self.table["changed"]:
            row[self.rank] = processes.pack(value)
            self.table["changed"].notify_all()
            if not self.table["changed"].wait_for(lambda: len(row) == self.size, timeout=20):
                raise DistributedError("no answer")
        return [processes.unpack(row[rank]) for rank in range(self.size)]


def in_ranks(count, work):
    """What `work(group)` returns or raises in each of `count` ranks."""
    table = {"changed": threading.Condition()}

    def run_rank(rank):
        try:
            return work(Thread(rank, count, table))
        except (DataError, DistributedError) as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return [*pool.map(run_rank, range(count))]


def contents(data):
    """All that tells two data sets apart."""
    splits = {part: split.read(np.arange(len(split))).tobytes() for part, split in data.parts.items()}
    more = [(split.labels.tolist(), split.skipped, type(split)) for split in data.parts.values()]
    return splits, more, data.mean, data.std, data.image_size, data.fingerprint


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("size", [20, 96])
def test_each_has_what_one_alone_would_have(size, count, tmp_path, monkeypatch):
    """Small images are kept, large ones read again; each is decoded by one of all."""
    monkeypatch.setattr(listing, "FILES", 3)
    monkeypatch.setattr(listing, "CHUNK", 4 * 3 * 20 * 20)
    folder = make_images(tmp_path / "images", train=5, test=2, size=size)
    (broken := next(folder.glob("train/*/*"))).write_bytes(b"none")
    decoded, open_rgb = [], listing.open_rgb
    monkeypatch.setattr(listing, "open_rgb", lambda image: (decoded.append(image), open_rgb(image))[1])
    alone = contents(load_data(folder, skip_corrupt=True))
    once = sorted(decoded)
    found = in_ranks(count, lambda group: contents(load_data(folder, skip_corrupt=True, group=group)))
    assert all(each == alone for each in found) and sorted(decoded) == sorted(2 * once)
    errors = in_ranks(count, lambda group: load_data(folder, group=group))
    assert all(isinstance(error, DataError) and str(broken) in str(error) for error in errors)


def test_images_that_differ_between_processes_are_noticed(tmp_path):
    """They lie at other paths, as on machines with disks of their own: other names and other ways to read them at once,
    other pixels by the fingerprint."""
    folders = [make_images(tmp_path / str(rank) / "images", train=2, test=1) for rank in range(2)]
    options = [{}, {}]

    def read(group):
        return load_data(folders[group.rank], group=group, **options[group.rank])

    whole = load_data(folders[0]).fingerprint
    assert [data.fingerprint for data in in_ranks(2, read)] == 2 * [whole]
    image = next(folders[1].glob("train/*/*"))
    Image.open(image).transpose(Image.Transpose.ROTATE_90).save(image)
    assert [data.fingerprint == whole for data in in_ranks(2, read)] == [True, False]
    options[1] = dict(image_size=16)
    assert all("rank 1 has another way to read images than rank 0: " in str(error) for error in in_ranks(2, read))
    image.unlink()
    assert all("rank 1 has another list of images than rank 0: " in str(error) for error in in_ranks(2, read))


def test_cifar10_is_looked_for_by_one_process_before_the_others(monkeypatch):
    """As it may have to be downloaded, by one of each machine, and machines may share the directory."""
    order = []
    monkeypatch.setattr(run, "cifar10_batches", lambda *_: order.append(threading.get_ident()))
    monkeypatch.setattr(run, "load_data", lambda *_, **__: order.append("load") or load_data("shapes", image_size=8))
    in_ranks(3, lambda group: run.load(TrainConfig(data="cifar10"), None, Display(shown=False), group))
    assert len(set(order[:2])) == 1 and order[2:] == ["load"] * 3
