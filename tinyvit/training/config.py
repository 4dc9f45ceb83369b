"""The options of a training run: one table for the command line, TOML files and config.json."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyvit.errors import UsageError
from tinyvit.execution.precision import PRECISIONS, hint
from tinyvit.files.fields import shown as shown_value
from tinyvit.files.reading import read_text
from tinyvit.files.text import nearest
from tinyvit.training.recipes import FILES, read_recipe

LONGEST_TOML, MOST_DOTS = 100_000, 1000  # bytes, and dots: a key of many parts takes tomllib minutes
ALL_BUT_HEAD = "all-but-head"  # a value of --freeze


class ValueOfOptionError(argparse.ArgumentTypeError, ValueError):
    """A text that is no value of an option; argparse shows the message as it is."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads the text of an option: gives what `convert` makes of it if that `fits`, else raises ValueOfOptionError.

    `metavar` stands for the value in the help; what `hint` says of a text that does not fit ends the message.
    """

    metavar: str
    expected: str
    convert: Callable[[str], Any]
    fits: Callable[[Any], bool] = lambda value: True
    hint: Callable[[str], str] = lambda text: ""

    def __call__(self, text: str) -> Any:
        with contextlib.suppress(ValueError):
            if self.fits(value := self.convert(text)):
                return value
        raise ValueOfOptionError(f"expected {self.expected}, got {text!r}{self.hint(text)}")


def whole(least: int) -> Reader:
    """A reader of whole numbers of at least `least`."""
    return Reader("N", f"a whole number of at least {least}", int, lambda x: x >= least)


def one_of(*choices: str, hint: Callable[[str, Sequence[str]], str] = nearest) -> Reader:
    """A reader of one of a few words."""
    expected = f"{', '.join(choices[:-1])} or {choices[-1]}"
    return Reader("|".join(choices), expected, str, choices.__contains__, lambda text: hint(text, choices))


def _sides(text: str) -> int | str:
    """S, the side of a square, or HxW, height and width of a rectangle. Raises ValueError."""
    sides = [whole(1)(side) for side in text.split("x")]
    if len(sides) > 2:
        raise ValueError
    return sides[0] if len(set(sides)) == 1 else "x".join(map(str, sides))


def height_and_width(size: int | str) -> tuple[int, int]:
    """What `image_size` read, as two numbers."""
    height, width = 2 * [size] if isinstance(size, int) else map(int, size.split("x"))
    return height, width


def channel_values(text: str) -> tuple[float, ...]:
    """The numbers in a text such as 0.5,0.5,0.5, one for each channel; raises ValueError."""
    return tuple(float(value) for value in text.split(","))


def _channels(which: str, fits: Callable[[float], bool]) -> Reader:
    """A reader of a number for each channel; pixels are in 0..1."""
    expected = f"numbers from 0 to 1{which}, separated by commas, as in 0.5,0.5,0.5"
    numbers = lambda text: ",".join(map(str, channel_values(text)))
    return Reader("X,Y,Z", expected, numbers, lambda text: all(map(fits, channel_values(text))))


def _policy(text: str) -> str:
    """The name of an augmentation policy. Raises ValueError."""
    from tinyvit.data.policies import parse

    parse(text)
    return text


positive = Reader("X", "a number above 0", float, lambda x: 0 < x < math.inf)
not_negative = Reader("X", "a number of at least 0", float, lambda x: 0 <= x < math.inf)
positive_share = Reader("X", "a number above 0 and at most 1", float, lambda x: 0 < x <= 1)
share = Reader("X", "a number from 0 to below 1", float, lambda x: 0 <= x < 1)
inner_share = Reader("X", "a number between 0 and 1", float, lambda x: 0 < x < 1)
frozen_part = Reader("PART", f"{ALL_BUT_HEAD} or a number of blocks", lambda x: x if x == ALL_BUT_HEAD else whole(0)(x))
image_size = Reader("S|HxW", "a whole number of at least 1, or two as in 160x224", _sides)
device_name = re.compile(r"auto|cpu|cuda(:\d+)?")
device = Reader("NAME", "auto, cpu, cuda or cuda:N (a GPU's number)", str, lambda x: bool(device_name.fullmatch(x)))
mean = _channels("", lambda x: 0 <= x <= 1)
std = _channels(" but 0", lambda x: 0 < x <= 1)
policy = Reader("NAME", "none, autoaugment or randaugment-N-M with M up to 30", _policy)


def option(default: Any, parse: Callable[[str], Any], meaning: str, metavar: str = "", *, free: bool = False) -> Any:
    """A field of TrainConfig: its default, its reader, what it means; `free` ones may change on --resume."""
    metavar = metavar or getattr(parse, "metavar", "")
    metadata = {"parse": parse, "metavar": metavar, "help": meaning, "free": free}
    return dataclasses.field(default=default, metadata=metadata)


# The learning rate and weight decay that suit each optimizer.
RATES = {"adamw": (1e-3, 0.05), "muon": (0.02, 0.02), "adam": (1e-3, 0.0), "sgd": (0.05, 5e-4)}
# Passes over the data unless said otherwise.
EPOCHS = 20
# Options that --no-augment leaves without effect.
VARIATIONS = ("policy", "erasing", "rotate", "zoom", "flip")
# The share that is held out of data without a test part.
VAL_FRACTION = 0.1


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The options of one training run; None means: chosen from the data when the run starts, and then recorded."""

    recipe: str | None = option(
        None, one_of(*FILES), "options that go together, below those beside it; `tinyvit recipes` lists them", "NAME"
    )
    data: str = option(
        "shapes",
        str,
        "shapes, cifar10, a directory of images, tar shards or parquet files, a .csv (path,label), .parquet or .tar",
        "SRC",
        free=True,
    )
    model: str | None = option(None, str, "a name from `tinyvit models` (default: by the size of the images)", "NAME")
    init: str | None = option(
        None, str, "begin with the weights of a run or checkpoint, and a new head for new classes", "CKPT"
    )
    head_init: str = option("zeros", one_of("zeros", "normal"), "weights of a new head; normal has 0.02")
    freeze: str | int | None = option(
        None, frozen_part, f"keep weights of --init: {ALL_BUT_HEAD}, or N for the embeddings and the first N blocks"
    )
    layer_decay: float = option(1.0, positive_share, "each layer learns at this share of the rate of the one above it")
    head_lr: float | None = option(
        None, positive, "highest learning rate of the head (default: --lr's); the schedule scales both alike"
    )
    out: str | None = option(None, str, "the run directory (default: runs/DATA-MODEL)", "RUN", free=True)
    epochs: int | None = option(None, whole(1), f"passes over the data (default: {EPOCHS})")
    minutes: float | None = option(None, positive, "end after this time, reading, evaluation and saving included", "M")
    batch_size: int | None = option(
        None, whole(1), "images per step, of all processes together (default: 64, less for few images)", "B"
    )
    lr: float | None = option(None, positive, "highest learning rate (default: 0.001, with sgd 0.05, with muon 0.02)")
    adam_lr: float = option(2e-3, positive, "with muon, the highest learning rate of all but hidden matrices")
    weight_decay: float | None = option(
        None, not_negative, "default: 0.05, with muon 0.02, with sgd 0.0005, with adam 0"
    )
    warmup: float = option(0.1, not_negative, "below 1: this share of the run (0.3: one-cycle); from 1: so many epochs")
    clip_norm: float = option(1.0, not_negative, "largest norm of a step's gradient; 0: no clipping")
    label_smoothing: float = option(0.1, share, "share of each label given to all classes")
    drop_path: float = option(0.0, share, "rate at which the last block's branches are dropped")
    dropout: float = option(
        0.0, share, "dropout after the position embedding, the projections and in the MLP, and no other"
    )
    mixup: float = option(0.0, not_negative, "mixup's alpha; 0: none")
    cutmix: float = option(0.0, not_negative, "cutmix's alpha; 0: none; with both, each batch has one of them")
    policy: str = option(
        "none", policy, "none, autoaugment (CIFAR-10's), or randaugment-N-M: N operations at level M of 30"
    )
    erasing: float = option(0.0, share, "probability of erasing a rectangle of a training image", "P")
    rotate: float = option(0.0, not_negative, "turn training images by up to so much", "DEGREES")
    zoom: float = option(0.0, share, "stretch training images by up to 1 +- X, height and width apart")
    flip: str = option(
        "random", one_of("random", "alternate"), "mirror training images at random, or in every second epoch"
    )
    repeats: int = option(1, whole(1), "a batch holds N variants of each of its images")
    augment: bool | None = option(
        None,
        bool,
        f"flip, shift and vary the training images (default: yes; with --freeze {ALL_BUT_HEAD} no, so that the "
        "features before the head are computed once)",
    )
    optimizer: str = option(
        "adamw", one_of(*RATES), "muon has AdamW for all but hidden matrices, sgd has Nesterov momentum 0.9"
    )
    schedule: str = option("cosine", one_of("cosine", "linear", "step", "constant"), "course of the learning rate")
    accumulate: int = option(1, whole(1), "parts in which a batch is computed, to save memory")
    ema: float = option(0.0, share, "decay of a moving average of the weights, used to evaluate; 0: none", "DECAY")
    class_weights: str = option("none", one_of("none", "balanced"), "balanced: rare classes count for more in the loss")
    patience: int | None = option(
        None, whole(1), "end after N epochs without a better validation accuracy (or, where equal, loss)"
    )
    seed: int = option(0, whole(0), "decides every random choice", "S")
    device: str = option("auto", device, "auto (a GPU where one works), cpu, cuda or cuda:N", free=True)
    precision: str = option(
        "fp32",
        one_of(*PRECISIONS, hint=hint),
        "of the arithmetic; tf32 on a GPU alone, fp16 is slow on a CPU; weights are kept in fp32",
    )
    threads: int | None = option(
        None, whole(1), "threads that share a batch, or a process's part of it (default: one a core)", free=True
    )
    image_size: int | str | None = option(
        None, image_size, "side, or height and width, of the images (default: the data's or the model's)"
    )
    patch_size: int | None = option(None, whole(1), "side of a patch (default: the model's)", "S")
    num_heads: int | None = option(None, whole(1), "attention heads (default: the model's)")
    log: str = option(
        "none", one_of("none", "tensorboard"), "tensorboard: write event files into the run, too", free=True
    )
    val_fraction: float | None = option(
        None,
        inner_share,
        "share of the training images that is held out to choose the best epoch "
        f"(default: {VAL_FRACTION} where the data has neither validation nor test part; otherwise that chooses)",
    )
    mean: str | None = option(
        None, mean, "mean of each channel, in 0..1, that the images are normalised by (default: the data's)"
    )
    std: str | None = option(None, std, "standard deviation of each channel, with --mean")
    skip_corrupt: bool = option(False, bool, "go on without images that cannot be read")


FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}


def flag(name: str) -> str:
    """How an option is written on the command line: batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


def read_toml(path: str | Path) -> dict[str, Any]:
    """Options from a TOML file of `option = value` lines, checked like the command line's. Raises UsageError."""
    try:
        text = read_text(path, LONGEST_TOML)
        if text.count(".") > MOST_DOTS:
            raise ValueError(f"it has more than {MOST_DOTS} dots")
        table = tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from None
    except RecursionError:
        raise UsageError(f"{path}: not TOML of options: it is nested too deeply") from None
    except ValueError as error:
        raise UsageError(f"{path}: not TOML: {' '.join(str(error)[:300].split())}") from None
    options: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in FIELDS:
            known = [flag(field)[2:] for field in FIELDS]
            raise UsageError(f"{path}: there is no option {key[:100]!r}{nearest(key[:100].replace('_', '-'), known)}")
        if name in options:
            raise UsageError(f"{path}: {name} is given twice")
        options[name] = read_value(path, key, name, value)
    if options.get("epochs") is not None and options.get("minutes") is not None:
        raise UsageError(f"{path}: give epochs or minutes, not both")
    return options


def read_value(path: str | Path, key: str, name: str, value: Any) -> Any:
    """The value that the file `path` gives the option `name` (as `key`). Raises UsageError."""
    parse = FIELDS[name].metadata["parse"]
    try:
        if isinstance(value, bool) != (parse is bool) or not isinstance(value, str | int | float):
            expected = "true or false" if parse is bool else "one value"
            raise ValueError(f"expected {expected}, got {shown_value(value)}")
        return value if parse is bool else parse(str(value))
    except ValueError as error:
        raise UsageError(f"{path}: {key}: {str(error)[:300]}") from None


def merge(file: Mapping[str, Any], command_line: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a file, overridden by those of the command line."""
    given = {**file, **command_line}
    if "minutes" in command_line:
        given.pop("epochs", None)
    if "epochs" in command_line:
        given.pop("minutes", None)
    return given


def with_recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` with the options of the recipe that it names."""
    return merge(read_recipe(given["recipe"]).options, given) if given.get("recipe") else dict(given)


def check_pairs(given: Mapping[str, Any]) -> None:
    """Refuse options that exclude or need each other. Raises UsageError."""
    options = with_recipe(given)
    init, freeze = options.get("init"), options.get("freeze")
    if init and options.get("model"):
        name = "model" if given.get("model") else "recipe"
        raise UsageError(f"{flag(name)} {given[name]} and --init {init} exclude each other: weights bring their model")
    if freeze is not None and not init:
        raise UsageError(f"--freeze {freeze} keeps weights of --init, and there is none")
    if options.get("recipe") == "finetune" and not init:
        raise UsageError("--recipe finetune goes on from the weights of --init, and there is none")
    chosen = [name for name, value in given.items() if value not in (None, FIELDS[name].default)]
    augment = freeze != ALL_BUT_HEAD if options.get("augment") is None else options["augment"]
    if not augment and (idle := [name for name in chosen if name in VARIATIONS]):
        off = "--no-augment" if given.get("augment") is False else f"--freeze {freeze}, unless with --augment,"
        raise UsageError(f"{shown(idle[0], given[idle[0]])} varies training images, and {off} leaves them as they are")
    if "adam_lr" in chosen and options.get("optimizer") != "muon":
        raise UsageError(f"--adam-lr {given['adam_lr']} is for --optimizer muon; for others the rate is --lr")
    mean, std = options.get("mean"), options.get("std")
    if (mean is None) != (std is None) or (mean and std and mean.count(",") != std.count(",")):
        raise UsageError(f"--mean and --std go together, with a value for each channel, got {mean} and {std}")


def reuses_features(options: TrainConfig) -> bool:
    """Whether a run sees the same images in every epoch, and trains nothing but the head."""
    return options.freeze == ALL_BUT_HEAD and not (options.augment or options.mixup or options.cutmix)


def shown(name: str, value: Any) -> str:
    """An option with its value as one would type it."""
    if isinstance(value, bool):
        return flag(name) if value else flag("no_" + name)
    return f"{flag(name)} {value}"


def same(name: str, value: Any, recorded: Any) -> bool:
    """Whether an option has the value that it had; a path may be written in another way."""
    if name == "init" and value and recorded:
        return Path(value).resolve() == Path(recorded).resolve()
    return value == recorded


def check_same(recorded: Mapping[str, Any], given: Mapping[str, Any], out: Path) -> None:
    """Refuse options that contradict those of the run being resumed. Raises UsageError."""
    for name, value in given.items():
        if FIELDS[name].metadata["free"] or same(name, value, recorded[name]):
            continue
        if recorded[name] is None:
            started = f"without {flag(name)}"
        else:
            started = f"with {shown(name, recorded[name])}, not {shown(name, value)}"
        raise UsageError(f"{out} was started {started}: leave the option out, or choose another --out")
