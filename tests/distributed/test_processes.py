"""Several processes under mpiexec, torchrun or with their variables alone train as one does, and end together."""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import ranks
from running import NANO, assert_one_line_error, environment, make_images, tinyvit
from runs import assert_same_weights, metrics, progress, without_times
from test_tcp import free_port

from tinyvit.distributed import ALONE

pytest.importorskip("mpi4py")
MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
pytestmark = pytest.mark.skipif(MPIEXEC is None, reason="there is no mpiexec")

OPTIONS = [*NANO, "--epochs", "2", "--batch-size", "9", "--ema", "0.9", "--drop-path", "0.1", "--mixup", "0.4"]
OPTIONS += ["--schedule", "constant"]


def together(count, *arguments, launcher="mpiexec", timeout=120):
    """Run ranks.py with `arguments` in `count` processes."""
    command, env = [sys.executable, ranks.__file__, *map(str, arguments)], environment(Path(__file__).parent)
    how = dict(capture_output=True, text=True, timeout=timeout)
    if launcher == "mpiexec":
        return subprocess.run([MPIEXEC, "-n", str(count), *command], **how, env=env)
    if launcher == "torchrun":
        agent = f"-m torch.distributed.run --standalone --nproc-per-node={count} --max-restarts=1 --no-python".split()
        agent = [sys.executable, *agent]
        return subprocess.run([*agent, *command], **how, env=env | {"OMP_NUM_THREADS": "1"})
    env |= dict(WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))

    def run(rank):
        return subprocess.run(command, **how, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)})

    with ThreadPoolExecutor(count) as pool:
        results = [*pool.map(run, range(count))]
    status = next((result.returncode for result in results if result.returncode), 0)
    stdout, stderr = ("".join(getattr(result, name) for result in results) for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(command, status, stdout, stderr)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("ranks") / "images", train=9)  # three steps an epoch


@pytest.fixture(scope="module")
def alone(images):
    """The run of one process with two shards."""
    out = images.parent / "alone"
    result = tinyvit("train", "--data", images, "--out", out, "--threads", 2, *OPTIONS)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="module")
def steps_alone():
    return {case: ranks.steps(ALONE, case) for case in ranks.CASES}


@pytest.mark.parametrize(("launcher", "count"), [("mpiexec", 3), ("variables", 2)])
def test_steps_have_the_bits_of_one_process_with_as_many_shards(launcher, count, steps_alone, tmp_path):
    result = together(count, "steps", tmp_path, launcher=launcher)
    assert result.returncode == 0, result.stderr
    for case, expected in steps_alone.items():
        for rank in range(count):
            with np.load(tmp_path / f"{case}-{rank}.npz") as found:
                assert found.keys() == expected.keys()
                for name, array in expected.items():
                    assert array.tobytes() == found[name].tobytes(), f"{case}, rank {rank}: {name} differs"


def test_killed_runs_end_everywhere_and_resume_to_the_same_bits(images, alone, tmp_path):
    """Killed under mpiexec, resumed under torchrun, killed there and resumed by torchrun itself."""
    out = tmp_path / "run"
    result = together(2, "kill", "train", "--data", images, "--out", out, "--threads", 1, *OPTIONS)
    assert result.returncode != 0
    assert result.stdout.splitlines()[1].startswith("2 processes, 2 on this machine: each takes 4 or 5 of 9 images")
    where = progress(out / "last.safetensors")
    assert where["epoch"] == 1 and not where["finished"]
    result = together(2, "kill", "train", "--out", out, "--resume", launcher="torchrun")
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith("tinyvit: error: ")]
    assert len(said) == 1 and re.search(r"rank 1 \(process \d+ on .*\) ended before the others", said[0])
    assert result.stdout.count(f"continuing {out} after step 3 of 6") == 2
    assert_same_weights(out, alone)
    for row, expected in zip(*(without_times(metrics(run)) for run in (out, alone)), strict=True):
        assert row == pytest.approx(expected, rel=1e-6)


def test_evaluations_and_probes_share_the_images(images, alone):
    command = ["eval", alone, "--data", images, "--json"]
    alone_too = tinyvit(*command), tinyvit(*command, "--probe", "knn")
    result = together(2, "none", *command, "then", *command, "--probe", "knn")
    probed = alone_too[1].stdout
    assert result.stdout.endswith(probed) and probed, (result.stderr, alone_too[1].stderr)
    one, two = map(json.loads, (alone_too[0].stdout, result.stdout.removesuffix(probed)))
    assert two.pop("loss") == pytest.approx(one.pop("loss"), rel=1e-6)
    assert one == two


def test_an_interrupt_of_one_process_stops_all_however_long_saving_takes(images, tmp_path):
    out = tmp_path / "run"
    result = together(2, "interrupt", "train", "--data", images, "--out", out, "--threads", 1, *OPTIONS)
    assert result.returncode != 0 and result.stderr == ""
    assert result.stdout.splitlines()[-1].startswith("stopped; to go on: ")
    assert progress(out / "last.safetensors")["step"] == ranks.FAULT_AT + 1


def test_another_number_of_processes_resumes(images, alone, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(alone, out)
    result = together(3, "none", "train", "--out", out, "--resume", "--epochs", "3")
    assert result.returncode == 0, result.stderr
    assert "a batch has 3 shards in place of 2: rounding will differ" in result.stdout
    assert progress(out / "last.safetensors")["finished"] and len(metrics(out)) == 3


@pytest.mark.parametrize(
    ("fault", "launcher", "message"),
    [
        ("hang", "mpiexec", "no answer for 1 s from rank 1 (process"),
        ("hang", "variables", "no answer for 1 s from rank 1 (process"),
        ("stop", "mpiexec", "no sign of life for 1 s from rank 1 (process"),
        ("stop", "variables", "no sign of life for 1 s from rank 1 (process"),
        ("lack", "mpiexec", "PMI_SIZE says that 2 processes train together, which needs MPI: pip install"),
        ("error", "mpiexec", "a planted fault"),
        ("error", "variables", "a planted fault"),
        ("numpy", "variables", "rank 1 has another version of NumPy than rank 0: '0.0' and"),
    ],
)
def test_a_fault_of_one_process_ends_all_with_one_line(images, tmp_path, launcher, fault, message):
    out = tmp_path / "run"
    result = together(2, fault, "train", "--data", images, "--out", out, *OPTIONS, launcher=launcher)
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if line.startswith("tinyvit: error: ")]
    assert len(said) == 1 and message in said[0], result.stderr
    assert "Traceback" not in result.stderr
    assert out.exists() == (fault in ("hang", "error"))
    if out.exists():
        assert progress(out / "last.safetensors")["epoch"] == 1


def test_bad_options_are_refused_once(tmp_path):
    result = together(2, "none", "train", "--data", tmp_path / "nothing", "--out", tmp_path / "run")
    assert_one_line_error(result, 1)
