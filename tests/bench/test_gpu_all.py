"""gpu_all runs its parts in their order, whatever becomes of each, and stays within its time."""

from __future__ import annotations

import itertools
import json
import os
import re
import tarfile
import time

import attention_bench
import cifar10_speedrun
import gpu_all
import pytest
import train_bench
from gpu_all import Part

from tinyvit.kernels.cuda import trial

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def python(name: str, program: str, limit: int = 20, least: int = 0) -> Part:
    return Part(name, ["-c", program], limit, least)


def test_a_part_that_fails_or_hangs_leaves_the_others_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_all, "GRACE", 1.0)
    hang = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('interrupted')"
    wanted = [
        python("broken", "print('before'); raise SystemExit(3)"),
        python("hanging", hang, limit=2),
        python("stubborn", STUBBORN, limit=2),
        python("fine", "import os; print(os.getcwd())"),
        python("long", "print('never')", least=1000),
    ]
    start = time.monotonic()
    records = gpu_all.run_all(wanted, tmp_path, 60.0)
    assert time.monotonic() - start < 30
    became = {record["part"]: record["became"] for record in records}
    assert became == {
        "broken": "failed: exit status 3",
        "hanging": "ended after 2 s",
        "stubborn": "ended after 2 s",
        "fine": "done",
        "long": "not started: no time left",
    }
    assert json.loads((tmp_path / "gpu_all.json").read_text()) == records
    (tmp_path / "kernels").mkdir()
    for name in ("kernels/compiled.json", "kernels/tinyvit_products.json"):
        (tmp_path / name).write_text("{}")
    gpu_all.pack(tmp_path)
    with tarfile.open(tmp_path / "gpu_all.tar.gz") as tar:
        texts = {f"{name}.txt" for name in ("broken", "hanging", "stubborn", "fine")}
        assert set(tar.getnames()) == texts | {"gpu_all.json", "tinyvit_products.json"}
    shown = {name: (tmp_path / f"{name}.txt").read_text().strip() for name in ("broken", "hanging", "stubborn", "fine")}
    assert (shown["broken"], shown["hanging"], shown["fine"]) == ("before", "interrupted", str(gpu_all.ROOT))
    time.sleep(0.1)  # the child is killed with its parent
    assert not _running(int(shown["stubborn"]))
    assert (
        len(re.findall("^[a-z]+ ", capsys.readouterr().out, re.MULTILINE)) == 5 and not (tmp_path / "long.txt").exists()
    )


def _running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_time_of_all_parts_bounds_each(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_all, "GRACE", 0.5)
    slow = python("slow", "import time; time.sleep(60)")
    records = gpu_all.run_all([slow, slow], tmp_path, 3.0)
    assert [record["became"] for record in records] == ["ended after 2 s", "not started: no time left"]


def test_the_parts_are_commands_that_exist(tmp_path):
    """Each with options that its script takes, a time limit, and figures in a file of its own."""
    table = gpu_all.parts(tmp_path, "DATA")
    parsers = {
        "train_bench": train_bench.parse,
        "attention_bench": attention_bench.parse,
        "cifar10_speedrun": cifar10_speedrun.parse,
    }
    for part in table:
        assert part.least <= part.limit <= 900
        script = part.command[0]
        assert script == "-m" or (gpu_all.ROOT / script).exists(), part
        if parse := parsers.get(script.removeprefix("bench/").removesuffix(".py")):
            assert parse(part.command[1:]).json == tmp_path / f"{part.name}.json"
        for file in (x for x in part.command if x.startswith("tests")):
            assert (gpu_all.ROOT / file).exists()
    assert len({part.name for part in table}) == len(table)
    ends = [*itertools.accumulate(part.limit + gpu_all.GRACE for part in table)]
    ends = {part.name: end for part, end in zip(table, ends, strict=True)}
    assert ends["attention"] < ends["steps-tiny"] < ends["steps-base"] <= 10 * 60  # ten minutes have room for these
    assert ends["kernels-others"] + 30 + gpu_all.GRACE <= 15 * 60  # after which tests of steps still start
    assert table[0].name == gpu_all.HOPPER and table[0].limit >= trial.SECONDS + 20  # to begin, too


def test_every_test_of_a_kernel_is_in_one_group(tmp_path):
    names = re.findall(r"def (test_\w+)", (gpu_all.ROOT / "tests/gpu/test_gpu_kernels.py").read_text())
    groups = [part.command for part in gpu_all.parts(tmp_path, "DATA") if part.name.startswith("kernels-")]
    words = re.compile(r"\b(?!not|and|or)\w+")
    for name in names:
        chosen = [eval(words.sub(lambda word, name=name: str(word[0] in name), group[-1])) for group in groups]
        assert sum(chosen) == 1, name


def test_without_kernels_for_hopper_the_others_leave_them_out(tmp_path, monkeypatch, capsys):
    """What failed and why is shown, and stands in the record."""
    monkeypatch.setenv("TINYVIT_WGMMA", "1")
    log = "FAILED tests/gpu/x.py::test_a[1] - cupy.CUDARuntimeError: cudaErrorIllegalAddress"
    shows = "import os; print(os.environ['TINYVIT_WGMMA'])"
    wanted = [
        python("before", shows),
        python(gpu_all.HOPPER, f"print('[gw1] FAILED tests/x.py::test_a[1]\\n{log}\\n'); raise SystemExit(1)"),
        python("after", shows),
        python("raises", "1 / 0"),
    ]
    records = gpu_all.run_all(wanted, tmp_path, 60.0)
    assert [(tmp_path / f"{name}.txt").read_text().strip() for name in ("before", "after")] == ["1", "0"]
    assert [record["conclusion"] for record in records[:3]] == [["1"], [log], ["0"]]
    assert records[3]["conclusion"][-1] == "ZeroDivisionError: division by zero"
    shown = capsys.readouterr().out
    assert log in shown and "division by zero" in shown and "TINYVIT_WGMMA=0" in shown


LOGS = {  # what they show; whether the other parts leave out what was tested
    "FAILED tests/gpu/x.py::test_a[1] - assert 0.5 < 0.01": False,  # they find out themselves
    "FAILED tests/gpu/x.py::test_a[1] - cupy.CUDARuntimeError: cudaErrorIllegalAddress": True,
    "worker 'gw1' crashed while running 'tests/gpu/x.py::test_a[1]'": True,
    "UserWarning: attention's forward kernel for Hopper is not used: their trial did not end within 90 s": True,
}


@pytest.mark.parametrize("text", LOGS)
@pytest.mark.parametrize("ended", [False, True])
def test_signs_that_a_test_breaks_the_gpu(tmp_path, text, ended):
    (tmp_path / "log").write_text(text)
    assert gpu_all._breaks(tmp_path / "log", ended) is LOGS[text]
    (tmp_path / "log").write_text(f"Timeout (0:01:00)!\n{text}")  # a test took more than a minute
    assert gpu_all._breaks(tmp_path / "log", ended) is (LOGS[text] or ended)


@pytest.mark.parametrize("shown, value", [("PASSED test_a", "1"), ("Timeout (0:01:00)!", "0")])
def test_a_part_that_is_ended_breaks_the_gpu_only_if_a_test_hangs(tmp_path, monkeypatch, shown, value):
    """As pytest shows a test that takes more than a minute: many short ones may come to their part's end, too."""
    monkeypatch.setenv("TINYVIT_WGMMA", "1")
    monkeypatch.setattr(gpu_all, "GRACE", 0.5)
    part = python(gpu_all.HOPPER, f"import time; print('{shown}', flush=True); time.sleep(60)", limit=2)
    assert gpu_all.run_all([part], tmp_path, 60.0)[0]["became"] == "ended after 2 s"
    assert os.environ["TINYVIT_WGMMA"] == value


def test_the_jobs_that_compile_do_run(monkeypatch):
    """On the CPU, where nothing is compiled."""
    jobs = gpu_all.jobs()
    assert ("vit_tiny_patch4_32", "bf16") in jobs and ("tiny-224", "float16") in jobs
    assert ("base-224", "float16") not in jobs  # the same tokens and heads
    gpu_all.warm(("vit_nano_patch8_32", "bf16"), "cpu")
    gpu_all.warm(("cifar-p8", "float32"), "cpu")


@pytest.mark.parametrize(
    "arguments, problem",
    [
        ([], "expected --json DIR"),
        (["--json", "x", "--data", "nowhere"], "expected --data cifar10 or a directory"),
        (["--json", "x", "--only", "test"], "expected parts among kernels-hopper, compile,"),
    ],
)
def test_bad_usage_is_one_line(arguments, problem, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu_all.main(arguments)
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and problem in shown and shown.count("\n") == 1
