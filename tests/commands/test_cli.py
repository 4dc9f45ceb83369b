"""The command line: what it prints, what it refuses and how it ends."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from running import COMMAND, NANO, assert_one_line_error, count_decoded, environment, make_images, start, tinyvit

import tinyvit as library
from tinyvit.checkpoints.loading import open_checkpoint
from tinyvit.cli import main
from tinyvit.data import load_data
from tinyvit.training.config import FIELDS, TrainConfig, UsageError, flag, read_toml


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("data") / "images", noise=60)


@pytest.fixture(scope="module")
def run(image_folder):
    """A finished run."""
    out = image_folder.parent / "run"
    result = tinyvit("train", "--data", image_folder, "--out", out, *NANO, "--epochs", "3", "--batch-size", "8")
    assert result.returncode == 0, result.stderr
    return out


def only_json(result):
    """The one JSON object on standard output, with nothing else there."""
    assert result.returncode == 0, result.stderr
    value = json.loads(result.stdout)
    assert isinstance(value, dict)
    return value


def own_predictions(run, image_folder):
    """Softmax over the logits of the test images, and their labels, found without the command line."""
    checkpoint = open_checkpoint(run)
    data = load_data(image_folder)
    images = data.test.read(np.arange(len(data.test))) / np.float64(255)
    mean, std = (np.array(v)[:, None, None] for v in checkpoint.preprocessing.statistics)
    logits = library.predict(library.load_model(run), ((images - mean) / std).astype(np.float32)).astype(np.float64)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True), data.test.labels


# --- eval -----------------------------------------------------------------------------------------------------


def test_eval_opens_the_images_of_its_split_alone(run, image_folder, monkeypatch, capsys):
    """So a broken image elsewhere is none of its business."""
    opened = count_decoded(monkeypatch)
    for split in ("test", "train"):
        assert main(["eval", str(run), "--data", str(image_folder), "--split", split]) == 0
        assert sorted(opened) == sorted((image_folder / split).glob("*/*.png"))
        opened.clear()


def test_eval_json_agrees_with_a_calculation_by_hand(run, image_folder):
    scores = only_json(tinyvit("eval", run, "--data", image_folder, "--split", "test", "--json"))
    p, labels = own_predictions(run, image_folder)
    hits = p.argmax(axis=1) == labels
    assert scores["accuracy"] == hits.mean()
    assert scores["top5"] == 1.0
    assert scores["loss"] == pytest.approx(-np.log(p[np.arange(len(p)), labels]).mean(), rel=1e-5)
    for k, name in enumerate(("blue", "green", "red")):
        assert scores["per_class"][name] == hits[labels == k].mean()
    assert list(scores["per_class"]) == ["blue", "green", "red"]


def test_eval_prints_a_table_that_lines_up(run, image_folder):
    result = tinyvit("eval", run / "last.safetensors", "--data", image_folder, "--split", "train")
    assert result.returncode == 0 and result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0] == "images, train split: 72 images"
    assert "accuracy" in lines[1] and "top-5" not in lines[1] and "loss" in lines[1]
    table = lines[3:]
    assert table[0].split() == ["class", "accuracy", "images"]
    assert [line.split()[0] for line in table[1:]] == ["blue", "green", "red"]
    assert len({len(line) for line in table}) == 1, "columns must line up"


def test_eval_counts_a_part_of_the_classes_by_their_names(run, image_folder, tmp_path):
    part = tmp_path / "part"
    for name in ("red", "blue"):
        (part / "train" / name).mkdir(parents=True)
        (part / "test" / name).mkdir(parents=True)
        for split in ("train", "test"):
            for source in (image_folder / split / name).iterdir():
                (part / split / name / source.name).write_bytes(source.read_bytes())
    whole, scores = (
        only_json(tinyvit("eval", run, "--data", d, "--split", "test", "--json")) for d in (image_folder, part)
    )
    assert scores["per_class"] == {**whole["per_class"], "green": None}


def test_eval_refuses_classes_that_the_model_does_not_know(run, tmp_path):
    result = tinyvit("eval", run, "--data", make_images(tmp_path / "other", train=1, test=1), "--split", "test")
    assert result.returncode == 0
    (tmp_path / "other" / "train" / "red").rename(tmp_path / "other" / "train" / "rouge")
    (tmp_path / "other" / "test" / "red").rename(tmp_path / "other" / "test" / "rouge")
    message = assert_one_line_error(tinyvit("eval", run, "--data", tmp_path / "other"), 1)
    assert "'rouge'" in message and "red" in message


# --- predict --------------------------------------------------------------------------------------------------


def test_predict_json_agrees_with_a_calculation_by_hand(run, image_folder):
    files = sorted((image_folder / "test").glob("*/*.png"))
    value = only_json(tinyvit("predict", run, *files, "--json", "--top", "2"))
    p, _ = own_predictions(run, image_folder)
    assert list(value) == ["predictions"]
    assert [prediction["image"] for prediction in value["predictions"]] == [str(file) for file in files]
    for prediction, row in zip(value["predictions"], p, strict=True):
        order = np.argsort(-row)[:2]
        assert [c["name"] for c in prediction["classes"]] == [("blue", "green", "red")[k] for k in order]
        assert [c["probability"] for c in prediction["classes"]] == pytest.approx(row[order], rel=1e-4)


def test_predict_names_what_it_sees(run, image_folder, tmp_path):
    photo = tmp_path / "sunset.jpg"  # larger than the model's images, not square
    Image.new("RGB", (120, 80), (150, 20, 20)).save(photo)
    result = tinyvit("predict", run, photo, image_folder / "test" / "blue" / "00.png")
    assert result.returncode == 0 and result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0] == str(photo) and len(lines) == 8
    assert lines[1].split()[0] == "red"
    shares = [float(line.split()[1].rstrip("%")) for line in lines[1:4]]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=0.1)


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_predict_names_an_image_that_cannot_be_read(run, image_folder, tmp_path, json_flag):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    good = image_folder / "test" / "red" / "00.png"
    for bad in (tmp_path / "broken.png", tmp_path / "absent.png", tmp_path):
        result = tinyvit("predict", run, good, bad, *json_flag)
        assert str(bad) in assert_one_line_error(result, 1)
        assert result.stdout == ""


# --- summary and models ---------------------------------------------------------------------------------------


def test_summary_of_a_name_a_run_and_a_file(run, capsys):
    base = only_json(tinyvit("summary", "vit_base_patch16_224", "--json"))
    assert base["parameters"] == 86_567_656
    for what in (run, run / "best.safetensors"):
        assert main(["summary", str(what), "--json"]) == 0
        value = json.loads(capsys.readouterr().out)
        assert value["parameters"] == sum(a.size for a in library.load_model(run).state_dict().values())
    assert main(["summary", "vit_base_patch16_224", "--image-size", "384"]) == 0
    assert "86,859,496" in capsys.readouterr().out
    assert main(["summary", "vit_base_patch16_224", "--image-size", "160x224"]) == 0
    assert "For one 160x224 image" in capsys.readouterr().out
    assert main(["summary", "vit_base_patch16_224", "--image-size", "100"]) == 1
    assert "image size 100x100 is not divisible by patch size 16" in capsys.readouterr().err


def test_models_lists_every_model_with_its_parameters():
    result = tinyvit("models")
    header, *lines = result.stdout.splitlines()
    assert header.split() == ["name", "width", "depth", "heads", "stem", "patch", "image", "parameters"]
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert list(rows) == library.list_models()
    assert rows["vit_base_patch16_224"] == ["768", "12", "12", "none", "16x16", "224x224", "86,567,656"]
    assert rows["vit_base_r50_s16_384"][3:5] == ["3-4-9", "1x1"] and rows["vit_tiny_r_s16_p8_224"][3] == "stem"
    assert rows["vit_large_patch16_224"][-1] == "304,326,632"
    assert len({len(line) for line in lines}) == 1, "columns must line up"


def test_info_shows_the_machine_and_what_holds_it_back():
    env = environment() | {"OPENBLAS_L2_SIZE": "512"}
    shown, as_json = (
        subprocess.run([*COMMAND, "info", *more], capture_output=True, text=True, env=env) for more in ([], ["--json"])
    )
    value = only_json(as_json)
    assert value["versions"]["tinyvit"] == library.__version__ and value["usable"] >= 1
    assert value["settings"]["OPENBLAS_L2_SIZE"] == "512"
    assert shown.returncode == 0 and np.__version__ in shown.stdout and shown.stderr == ""
    assert all(finding in shown.stdout for finding in value["findings"])


# --- bad usage ------------------------------------------------------------------------------------------------

BAD_USAGE = [
    (
        [],
        "expected a command: train, eval, predict, summary, convert, export, report, compare, watch, plot, recipes, "
        "models or info",
    ),
    (["trian"], "models or info, got 'trian'; did you mean train?"),
    (["--verbose"], "--verbose"),
    (["train", "--epoch", "3"], "train does not know --epoch; did you mean --epochs?"),
    (["train", "--opt", "sgd"], "train does not know --opt; did you mean --optimizer?"),
    (["train", "stray"], "train does not know stray"),
    (["train", "--epochs"], "--epochs: expected one argument"),
    (["train", "--epochs", "0"], "--epochs: expected a whole number of at least 1, got '0'"),
    (["train", "--epochs", "-3"], "--epochs: expected a whole number of at least 1, got '-3'"),
    (["train", "--epochs", "2.5"], "--epochs: expected a whole number of at least 1, got '2.5'"),
    (["train", "--epochs", "3", "--minutes", "1"], "--minutes: not allowed with argument --epochs"),
    (["train", "--minutes", "0"], "--minutes: expected a number above 0, got '0'"),
    (["train", "--minutes", "inf"], "--minutes: expected a number above 0, got 'inf'"),
    (["train", "--batch-size", "0"], "--batch-size: expected a whole number of at least 1"),
    (["train", "--lr", "nan"], "--lr: expected a number above 0, got 'nan'"),
    (["train", "--lr", "-1"], "--lr: expected a number above 0, got '-1'"),
    (["train", "--lr", "fast"], "--lr: expected a number above 0, got 'fast'"),
    (["train", "--weight-decay", "-0.1"], "--weight-decay: expected a number of at least 0"),
    (["train", "--warmup", "-1"], "--warmup: expected a number of at least 0"),
    (["train", "--label-smoothing", "1"], "--label-smoothing: expected a number from 0 to below 1"),
    (["train", "--drop-path", "1.5"], "--drop-path: expected a number from 0 to below 1"),
    (["train", "--ema", "1"], "--ema: expected a number from 0 to below 1"),
    (["train", "--val-fraction", "0"], "--val-fraction: expected a number between 0 and 1"),
    (["train", "--optimizer", "lion"], "--optimizer: expected adamw, muon, adam or sgd, got 'lion'"),
    (["train", "--precision", "int8"], "bf16 or fp16, got 'int8': it is for predictions alone, train in bf16 or fp32"),
    (["eval", "run", "--data", "shapes", "--precision", "BF16"], "fp16 or int8, got 'BF16'; did you mean bf16?"),
    (["train", "--schedule", "square"], "--schedule: expected cosine, linear, step or constant, got 'square'"),
    (
        ["train", "--policy", "randaugment"],
        "--policy: expected none, autoaugment or randaugment-N-M with M up to 30, got",
    ),
    (["train", "--device", "tpu"], "--device: expected auto, cpu, cuda or cuda:N (a GPU's number), got 'tpu'"),
    (["train", "--seed", "-1"], "--seed: expected a whole number of at least 0"),
    (["train", "--threads", "0"], "--threads: expected a whole number of at least 1"),
    (["train", "--model", "vit_bas_patch16_224"], "did you mean vit_base_patch16_224?"),
    (["train", "--config", "no/such.toml"], "no/such.toml: No such file or directory"),
    (["eval", "run"], "the following arguments are required: --data"),
    (["eval", "run", "--data", "shapes", "--split", "dev"], "--split: expected train, val, test or all, got 'dev'"),
    (["predict", "run"], "IMAGE"),
    (["predict", "run", "a.jpg", "--top", "0"], "--top: expected a whole number of at least 1"),
    (["summary"], "NAME|RUN|CKPT"),
    (["summary", "vit_huge_patch14"], "there is no model 'vit_huge_patch14'; did you mean vit_huge_patch14_224?"),
    (["summary", "vit_tiny_patch16_224", "--image-size", "x"], "--image-size: expected a whole number"),
    (["train", "--image-size", "16x"], "--image-size: expected a whole number of at least 1, or two as in 160x224"),
    (["train", "--image-size", "8x16x32"], "or two as in 160x224, got '8x16x32'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_USAGE, ids=[" ".join(a) or "nothing" for a, _ in BAD_USAGE])
def test_bad_usage_is_one_line_and_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("tinyvit: error: ") and printed.err.count("\n") == 1, printed.err
    assert message in printed.err
    assert printed.out == "" and list(tmp_path.iterdir()) == []


def test_commands_of_tests_are_this_tinyvit_and_find_no_gpu(tmp_path):
    program = "import os, tinyvit; print(tinyvit.__file__); print([os.environ['CUDA_VISIBLE_DEVICES']])"
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=tmp_path)
    assert result.stdout.splitlines() == [library.__file__, "['']"], result.stderr


FAILED_WORK = [
    ["predict", "absent", "a.png"],
    ["summary", "EMPTY"],
    ["train", "--out", "EMPTY", "--resume"],
    ["train", "--out", "absent", "--resume"],
    ["train", "--data", "EMPTY", "--out", "new"],
    ["train", "--data", "FILE", "--out", "new"],
    ["eval", "FILE", "--data", "shapes"],
]


@pytest.mark.parametrize("arguments", FAILED_WORK, ids=[" ".join(a) for a in FAILED_WORK])
def test_failed_work_is_one_line_and_status_1(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").write_text("no weights here")
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("tinyvit: error: ") and printed.err.count("\n") == 1, printed.err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["train", "eval"])
def test_cuda_without_cupy_names_the_extras(run, image_folder, tmp_path, command):
    blocked = tmp_path / "cupy"
    blocked.mkdir()
    (blocked / "__init__.py").write_text("raise ImportError('not here')")
    arguments = ["--data", str(image_folder), "--device", "cuda"]
    arguments = ["eval", str(run), *arguments] if command == "eval" else ["train", "--out", "new", *NANO, *arguments]
    env = environment(first=tmp_path)
    result = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=env, cwd=tmp_path)
    message = assert_one_line_error(result, 1)
    assert "cuda12" in message and "cuda13" in message
    assert not (tmp_path / "new").exists()


# --- the options and their file -------------------------------------------------------------------------------


def test_every_option_has_help_and_a_default_that_its_reader_gives_back():
    for name, field in FIELDS.items():
        assert field.metadata["help"]
        if field.default is not None and not isinstance(field.default, bool):
            assert field.metadata["parse"](str(field.default)) == field.default, name
    shown = tinyvit("train", "--help").stdout
    assert all(flag(name) in shown for name in FIELDS)
    assert "--flip random|alternate" in shown and "--schedule cosine|linear|step|constant" in shown


def test_a_toml_file_gives_options_and_the_command_line_counts_more(image_folder, tmp_path):
    config = tmp_path / "recipe.toml"
    config.write_text(
        f'data = "{image_folder}"\nmodel = "vit_nano_patch8_32"\nminutes = 5\nbatch-size = 24\n'
        'label_smoothing = 0\naugment = false\noptimizer = "sgd"\n'
    )
    result = tinyvit("train", "--config", config, "--epochs", "1", "--lr", "0.02", "--out", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    options = json.loads((tmp_path / "run" / "config.json").read_text())["options"]
    expected = {"minutes": None, "epochs": 1, "batch_size": 24, "label_smoothing": 0.0, "augment": False, "lr": 0.02}
    assert {name: options[name] for name in expected} == expected
    assert options["optimizer"] == "sgd" and options["weight_decay"] == 5e-4
    again = tinyvit("train", "--config", config, "--epochs", "1", "--resume", "--out", tmp_path / "run")
    assert "finished" in again.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochz = 3", "there is no option 'epochz'; did you mean epochs?"),
        ("batch_sise = 3", "did you mean batch-size?"),
        ("resume = true", "there is no option 'resume'"),
        ("lr = -1", "lr: expected a number above 0, got '-1'"),
        ("lr = nan", "lr: expected a number above 0, got 'nan'"),
        ("epochs = 2.5", "epochs: expected a whole number of at least 1, got '2.5'"),
        ("epochs = true", "epochs: expected one value, got True"),
        ("epochs = [1, 2]", "epochs: expected one value"),
        ('augment = "yes"', "augment: expected true or false, got 'yes'"),
        ("batch-size = 3\nbatch_size = 4", "batch_size is given twice"),
        ("epochs = 3\nminutes = 4", "give epochs or minutes, not both"),
        ("epochs = ", "not TOML"),
        ("[train]\nepochs = 3", "there is no option 'train'"),
        ("device = 'tpu'", "device: expected auto, cpu, cuda or cuda:N"),
    ],
)
def test_a_toml_file_is_checked_like_the_command_line(tmp_path, text, message):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_toml(path)
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        ".".join("a" * 100_000) + " = 1", ".".join("a" * 40_000) + " = 1", "[" + ".".join("a" * 40_000) + "]",
        "epochs = " + "[" * 50_000, "epochs = 0x" + "f" * 50_000, "data = '" + "x" * 90_000, "x" * 90_000 + " = 1",
        "epochs = '" + "x" * 90_000 + "'", "augment = '" + "x" * 90_000 + "'", "# " + "x" * 200_000,
    ],
)  # fmt: skip
def test_a_toml_file_takes_little_time_and_one_line(tmp_path, text):
    (tmp_path / "a.toml").write_text(text)
    started = time.monotonic()
    with pytest.raises(UsageError) as caught:
        read_toml(tmp_path / "a.toml")
    assert time.monotonic() - started < 2 and len(str(caught.value)) <= 500 + len(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_toml_file_that_is_not_text(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not TOML"):
        read_toml(tmp_path / "a.toml")


def test_toml_and_command_line_give_the_same_options(tmp_path):
    """Every option with a value of its own, once as TOML and once as an argument."""
    values = {name: field.default for name, field in FIELDS.items() if field.default is not None}
    text = "".join(f"{flag(name)[2:]} = {json.dumps(value)}\n" for name, value in values.items())
    (tmp_path / "a.toml").write_text(text)
    assert TrainConfig(**read_toml(tmp_path / "a.toml")) == TrainConfig()


# --- the way out ----------------------------------------------------------------------------------------------


def test_a_reader_that_goes_away_causes_no_traceback():
    process = start("models")
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_output_that_cannot_be_written_is_an_error():
    with open("/dev/full", "w") as full:
        result = subprocess.run([*COMMAND, "models"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert "No space left" in result.stderr


def test_an_interrupt_before_training_is_one_line(monkeypatch, capsys):
    from tinyvit.models import registry

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "list_models", interrupted)
    assert main(["models"]) == 130
    assert capsys.readouterr().err == "tinyvit: interrupted\n"


def test_an_interrupt_during_the_imports_is_one_line(tmp_path):
    (tmp_path / "numpy.py").write_text("raise KeyboardInterrupt")
    result = subprocess.run([*COMMAND, "models"], capture_output=True, text=True, env=environment(first=tmp_path))
    assert (result.returncode, result.stderr) == (130, "tinyvit: interrupted\n")


def test_version_and_help():
    assert tinyvit("--version").stdout == f"tinyvit {library.__version__}\n"
    shown = tinyvit("--help").stdout
    assert all(command in shown for command in ("train", "eval", "predict", "summary", "models"))


def test_the_command_and_the_module_are_the_same():
    command = os.path.join(os.path.dirname(sys.executable), "tinyvit")
    if not os.path.exists(command):
        pytest.skip("the console script is not installed beside this Python")
    installed = subprocess.run([command, "models"], capture_output=True, text=True)
    assert installed.stdout == tinyvit("models").stdout
