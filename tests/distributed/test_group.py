"""What a group tells, without MPI."""

import itertools
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import NANO, make_images
from runs import progress, snapshot

import tinyvit
from tinyvit import cli, commands, optim
from tinyvit.backend import arrays, parallel
from tinyvit.checkpoints.checkpoint import LAST
from tinyvit.checkpoints.loading import open_checkpoint
from tinyvit.data import Augment, Loader
from tinyvit.data.splits import ArraySplit
from tinyvit.distributed import ALONE, DistributedError, Group, launch, processes, reduction
from tinyvit.distributed.group import SLOW
from tinyvit.evaluation.metrics import evaluate
from tinyvit.training import run
from tinyvit.training.config import TrainConfig


def rank_of(rank, size):
    group = Group()
    group.rank, group.size = rank, size
    return group


@given(shards=st.integers(1, 40), processes=st.integers(1, 8))
def test_the_sum_along_the_tree_does_not_depend_on_the_processes(shards, processes):
    """With addition that writes down its order."""
    add = "({}+{})".format
    expected = reduction.sum_in_order(map(str, range(shards)), shards, add)
    known = {}
    for start, stop in itertools.pairwise(shards * i // processes for i in range(processes + 1)):
        for first, last in reduction.parts_within(0, shards, start, stop):
            assert start <= first < last <= stop

            def leaf(a, b):
                return str(a) if b - a == 1 else None

            known[first, last] = reduction.tree_sum(first, last, leaf, add)
    assert sorted(i for part in known for i in range(*part)) == list(range(shards))
    assert reduction.tree_sum(0, shards, lambda *part: known.get(part), add) == expected


@given(batch=st.integers(1, 30), shards=st.integers(1, 6), processes=st.integers(1, 6))
def test_processes_get_whole_shards(batch, shards, processes):
    ranges = parallel.plan(batch, 1, shards * processes).ranges
    for rank in range(processes):
        group = rank_of(rank, processes)
        mine = ranges[slice(*group.part(len(ranges)))]
        first, last = group.part(batch)
        assert [n for pair in mine for n in range(*pair)] == list(range(first, last))


@given(batch=st.integers(2, 20), processes=st.integers(1, 5), mixed=st.booleans(), seed=st.integers(0, 99))
def test_parts_of_a_batch_are_those_of_the_whole(batch, processes, mixed, seed):
    processes = min(processes, batch)
    rng = np.random.default_rng(seed)
    split = ArraySplit(rng.integers(0, 256, (2 * batch, 3, 8, 8), dtype=np.uint8), rng.integers(0, 5, 2 * batch), [])
    mix = dict(mixup=0.4, cutmix=1.0, num_classes=5) if mixed else {}
    augment = Augment((0.5,) * 3, (0.2,) * 3, flip=True, padding=2, erasing=0.5, turn=9, zoom=0.2, **mix)
    options = dict(transform=augment, seed=seed, alternate_flip=True)
    whole = list(Loader(split, batch, **options).epoch(1))
    parts = [list(Loader(split, batch, **options, group=rank_of(r, processes)).epoch(1)) for r in range(processes)]
    for number, (images, labels) in enumerate(whole):
        for x, field in ((images, 0), (labels, 1)):
            assert x.tobytes() == np.concatenate([part[number][field] for part in parts]).tobytes()


def test_a_process_reads_only_its_part():
    read = []

    class Noted(ArraySplit):
        def read(self, indices, rng=None):
            read.append(indices)
            return super().read(indices, rng)

    split = Noted(np.zeros((12, 3, 4, 4), np.uint8), np.arange(12), [])
    list(Loader(split, 6, transform=lambda x, y, rng: (x, y), shuffle=False, group=rank_of(1, 3)).epoch(0))
    assert [list(indices) for indices in read] == [[2, 3], [8, 9]]


@pytest.mark.parametrize(
    ("mine", "local", "quota", "threads"),
    [
        ({0, 1, 2, 3}, [{0, 1, 2, 3}] * 2, None, 2),  # not bound: they share all cores
        ({0, 1}, [{0, 1}, {2, 3}], None, 2),  # bound
        ({0}, [{0}] * 4, None, 1),  # more processes than cores
        (set(range(8)), [set(range(8))] * 2, 3, 1),  # a container with three of eight cores
        ({0, 1, 2}, [{0, 1, 2}, {2}], None, 2),
    ],
)
def test_cores_are_shared(mine, local, quota, threads):
    assert processes._share_of_cores(frozenset(mine), [frozenset(x) for x in local], quota) == threads


@pytest.fixture
def variables(monkeypatch):
    """Sets what a launcher would, and nothing else."""
    for name in (*launch.MPI_VARIABLES, *launch.TORCHRUN_VARIABLES, "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return lambda **those: [monkeypatch.setenv(name, str(value)) for name, value in those.items()]


def test_without_a_launcher_a_process_is_alone(variables):
    variables(SLURM_STEP_NUM_TASKS=1, SLURM_PROCID=0)  # a batch script
    assert launch.init.__wrapped__() is ALONE and ALONE.leads and ALONE.part(7) == (0, 7)


def test_commands_that_share_nothing_need_no_launcher(variables, capsys):
    launch.init.cache_clear()
    variables(WORLD_SIZE=4)
    assert cli.main(["models"]) == 0 and "vit_tiny_patch16_224" in capsys.readouterr().out


def test_missing_mpi_and_other_launchers_are_named(variables, monkeypatch):
    variables(PMI_SIZE=4)
    monkeypatch.setattr(launch.atexit, "register", lambda *arguments: None)
    with pytest.raises(DistributedError, match=r"PMI_SIZE says that 4 processes .* MPI sees 1"):
        launch.init.__wrapped__()
    monkeypatch.setitem(__import__("sys").modules, "mpi4py", None)
    with pytest.raises(DistributedError, match=r"needs MPI: pip install .tinyvit\[mpi\]"):
        launch.init.__wrapped__()
    variables(PMI_RANK=3)
    monkeypatch.setattr(launch, "HEAD_START", 0)
    with pytest.raises(DistributedError, match="needs MPI"):
        launch.init.__wrapped__()


THERE = dict(RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=29500)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (dict(PMI_SIZE=2, PMI_RANK=1, WORLD_SIZE=4), ("PMI_SIZE", 2, 1)),
        (dict(PMI_SIZE=2, PMI_RANK=0, WORLD_SIZE=2, **THERE), ("WORLD_SIZE", 2, 0)),
        (dict(PMI_SIZE=2, PMI_RANK=1, WORLD_SIZE=8, **THERE, TORCHELASTIC_RUN_ID="a"), ("WORLD_SIZE", 8, 0)),
        (dict(SLURM_STEP_NUM_TASKS=2, SLURM_PROCID=1, WORLD_SIZE=8, **THERE), ("WORLD_SIZE", 8, 0)),
    ],
)
def test_the_nearest_launcher_counts(variables, given, expected):
    variables(**given)
    assert launch.launched() == expected


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (dict(WORLD_SIZE=2), "WORLD_SIZE is 2 without RANK and MASTER_ADDR and MASTER_PORT: start with"),
        (dict(WORLD_SIZE="two", **THERE), "WORLD_SIZE is 'two', expected a whole number"),
        (dict(WORLD_SIZE=2) | THERE | dict(RANK=2), "RANK is 2, expected less than 2"),
        (dict(WORLD_SIZE=2) | THERE | dict(MASTER_PORT=70000), "MASTER_PORT 70000 makes 70000, expected a port"),
        (dict(PMI_SIZE=2, PMI_RANK=0, WORLD_SIZE=4, **THERE), "rank 0 of 2, WORLD_SIZE and RANK say 0 of 4: unset"),
    ],
)
def test_variables_that_cannot_be_are_named(variables, given, problem):
    variables(**given)
    with pytest.raises(DistributedError, match=problem):
        launch.init.__wrapped__()


def test_what_differs_between_processes_is_named(monkeypatch):
    group = rank_of(0, 2)
    monkeypatch.setattr(group, "exchange", lambda value, patience: [value, {**value, "--seed": 9}])
    group.same({"--lr": 1.0, "--seed": 9})
    with pytest.raises(DistributedError, match="rank 1 has another --seed than rank 0: 9 and 0"):
        group.same({"--lr": 1.0, "--seed": 0})
    with pytest.raises(DistributedError, match="rank 1 has another --seed than rank 0: 9 and None"):
        group.same({"--lr": 1.0})


def test_commands_refuse_what_another_process_has_otherwise(tmp_path, monkeypatch, capsys):
    """As where machines have versions, checkpoints or run directories of their own."""
    images, out, group, told = make_images(tmp_path / "images", train=2, test=1), tmp_path / "run", rank_of(0, 2), {}
    new = ["train", "--data", images, *NANO, "--epochs", 1, "--out"]
    assert cli.main([*map(str, [*new, out])]) == 0

    def exchange(value, patience=None):
        if not isinstance(value, dict):
            return [value, value]
        told.update(value)
        return [value, value | {name: "other" for name in value if what in name}]

    monkeypatch.setattr(group, "exchange", exchange)
    for module in (cli, commands, run):
        monkeypatch.setattr(module, "init", lambda: group)
    where, before = progress(out / LAST), snapshot(out)
    for what, command, ours in (
        ("version of tinyvit", [*new, tmp_path / "other"], tinyvit.__version__),
        ("checksum of the weights", ["eval", out, "--data", images], arrays.checksum(open_checkpoint(out).state)),
        ("its step and seconds", ["train", "--out", out, "--resume"], [where["step"], where["seconds"]]),
        ("no option", [*new, tmp_path / "other", "--batch-size", 1], None),  # all agree on it
    ):
        said = f"rank 1 has another .*{what}.* than rank 0: 'other' and .*"
        said = said if ours else "--batch-size 1 is less than one image for each of 2 processes"
        assert cli.main([*map(str, command)]) == (1 if ours else 2)
        assert re.fullmatch(f"tinyvit: error: {said}\n", capsys.readouterr().err)
        assert next((value for name, value in told.items() if what in name), None) == ours
    assert snapshot(out) == before and not (tmp_path / "other").exists()


def test_an_evaluation_shares_images_however_few():
    """Among five threads as processes, two of which have none."""
    images, labels = np.zeros((3, 3, 32, 32), np.uint8), np.arange(3)
    images[1:] += 99
    split, model = ArraySplit(images, labels, []), tinyvit.create_model("vit_nano_patch8_32", num_classes=3)
    given, all_gave = {}, threading.Barrier(5)

    def scores(rank, stop=lambda: False):
        def exchange(value, patience):
            assert patience == SLOW  # for a GPU's kernels are compiled and tried in some batches
            given[rank] = value
            all_gave.wait(30)
            found = [given[r] for r in range(5)]
            all_gave.wait(30)
            return found

        group = rank_of(rank, 5)
        group.exchange = exchange
        classes, scaling = ("a", "b", "c"), Augment((0.5,) * 3, (0.2,) * 3)
        return evaluate(model, split, labels, classes, scaling, stop=stop, group=group)

    whole = evaluate(model, split, labels, ("a", "b", "c"), Augment((0.5,) * 3, (0.2,) * 3))
    with ThreadPoolExecutor(5) as pool:
        for found in pool.map(scores, range(5)):
            assert found.accuracy == whole.accuracy and found.loss == pytest.approx(whole.loss)
            assert list(found.predicted) == list(whole.predicted)
        assert set(pool.map(scores, range(5), [lambda: False] * 4 + [lambda: True])) == {None}


@pytest.mark.parametrize("what", ["checksum of the weights", "set of instructions", "kind of bf16", "BLAS"])
def test_a_step_refuses_processes_that_would_not_keep_equal_weights(what, monkeypatch):
    """Other weights at the start, or another last bit in an update."""
    group = rank_of(0, 2)
    model = tinyvit.create_model("vit_nano_patch8_32", num_classes=3)
    step = tinyvit.TrainStep(model, optim.SGD(model.parameters(), lr=0.1), group=group)

    def exchange(value, patience):
        assert what in value and value["checksum of the weights"] == arrays.checksum(model.state_dict())
        return [value, {**value, what: "other"}]

    monkeypatch.setattr(group, "exchange", exchange)
    with pytest.raises(DistributedError, match=f"rank 1 has another {what} than rank 0: 'other' and "):
        step(np.zeros((1, 3, 32, 32), np.float32), np.zeros(1, int))


def test_after_the_first_step_processes_wait_longer_for_each_other(monkeypatch):
    """As a GPU's kernels are compiled and tried in it."""
    group, asked, reduced = rank_of(0, 2), [], {}
    model = tinyvit.create_model("vit_nano_patch8_32", num_classes=3)
    step = tinyvit.TrainStep(model, optim.SGD(model.parameters(), lr=0.1), group=group)

    def add(shard, number, array):
        reduced[number] = array

    def finish():
        asked.append("summed")
        return [reduced[number] for number in sorted(reduced)]

    sums = SimpleNamespace(begin=reduced.clear, add=add, finish=finish)
    monkeypatch.setattr(group, "reduction", lambda like, shards: sums)
    monkeypatch.setattr(group, "exchange", lambda value, patience=None: (asked.append(patience), [value, value])[1])
    for _ in range(2):
        step(np.zeros((1, 3, 32, 32), np.float32), np.zeros(1, int))
    assert asked == [SLOW, None, "summed", SLOW, None, "summed"]


def test_weights_to_begin_with_are_compared_before_a_run_is_written(monkeypatch):
    """A frozen body's too, of which no step knows."""
    group, told, state = rank_of(0, 2), [], {"body": np.ones(3)}
    monkeypatch.setattr(group, "exchange", lambda value, patience: (told.append(value), [value, value])[1])
    options = TrainConfig(batch_size=2, device="cpu")
    run.check_together(group, options, SimpleNamespace(fingerprint="x"), SimpleNamespace(state=state))
    assert told[0]["checksum of the weights"] == arrays.checksum(state) != arrays.checksum({"body": np.zeros(3)})
