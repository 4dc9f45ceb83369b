"""From options to a trained model: which data, model and run directory; starting, timing and resuming a run."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinyvit.backend import arrays
from tinyvit.checkpoints.checkpoint import BEST, LAST, Checkpoint
from tinyvit.checkpoints.loading import open_checkpoint
from tinyvit.data import Data, load_data, resident
from tinyvit.data.sources.listing import SMALL
from tinyvit.data.splits import hold_out
from tinyvit.evaluation.metrics import pick_device
from tinyvit.execution import system_info
from tinyvit.models.registry import model_config
from tinyvit.training import run_directory
from tinyvit.training.build import keeps_head, make_model
from tinyvit.training.config import (
    ALL_BUT_HEAD,
    EPOCHS,
    RATES,
    SHAPES_EPOCHS,
    VAL_FRACTION,
    TrainConfig,
    UsageError,
    check_pairs,
    height_and_width,
    with_recipe,
)
from tinyvit.training.finetune import Backbone, reuses_features, with_features
from tinyvit.training.progress import Display, clock
from tinyvit.training.schedule import Deadline, Plan, make_plan
from tinyvit.training.trainer import Position, Stop, Trainer, read_position


def train(given: dict[str, Any], *, resume: bool = False, started: float | None = None) -> Position:
    """Train as `given` (fields of TrainConfig) says, in a new run directory or, with `resume`, in one begun before.

    `started` is when the clock of `minutes` began (of time.monotonic; default: now). Returns where the run ended.
    Raises UsageError, TrainError, EvaluationError, CheckpointError, DataError, ValueError (a model that does not
    fit the images), OSError, and Stopped after SIGINT or SIGTERM.
    """
    started = time.monotonic() if started is None else started
    if resume and given.get("out"):
        return resume_run(Path(given["out"]), given)
    if not resume and given.get("out"):
        run_directory.check_unused(Path(given["out"]))
    check_pairs(given)
    options = TrainConfig(**with_recipe(given))
    if options.device != "auto":
        pick_device(options.device)  # before data are fetched for it
    checkpoint = open_init(options)
    data = load(options, checkpoint)
    options = complete(options, data)
    if resume:  # the run to resume goes by its usual name; it may have been started with options of its own
        return resume_run(Path(options.out), given)
    return start_run(options, data, checkpoint, started)


def open_init(options: TrainConfig) -> Checkpoint | None:
    """The weights to begin with, read once for all that needs them."""
    return None if options.init is None else open_checkpoint(options.init)


def load(options: TrainConfig, checkpoint: Checkpoint | None) -> Data:
    """The data set, in the size asked for, else the model's, else the images'; prepared as for `checkpoint`."""
    size = None if options.image_size is None else height_and_width(options.image_size)
    if size is None and checkpoint is not None:
        size = checkpoint.image_size
    elif size is None and options.model is not None:
        size = model_config(options.model).image_size
    data = load_data(
        options.data,
        image_size=size,
        val_fraction=VAL_FRACTION if options.val_fraction is None else options.val_fraction,
        seed=options.seed,
        skip_corrupt=options.skip_corrupt,
        fit_options=None if checkpoint is None else checkpoint.preprocessing.fit,
        statistics=(checkpoint.mean, checkpoint.std) if checkpoint is not None and reuses_features(options) else None,
    )
    if options.val_fraction is not None and data.val is not None:
        raise UsageError(
            f"--val-fraction {options.val_fraction} holds out images, but {data.name} has validation images of its own"
        )
    if options.val_fraction is not None and data.own_test:
        data = hold_out(data, options.val_fraction, options.seed)
    return data if checkpoint is None else dataclasses.replace(data, mean=checkpoint.mean, std=checkpoint.std)


def complete(options: TrainConfig, data: Data) -> TrainConfig:
    """`options` with what was left to be chosen from the data. Raises UsageError."""
    small = max(data.image_size) <= SMALL
    usual = "vit_micro_patch4_32" if small else "vit_tiny_patch16_224"
    model = options.model or (Path(options.init).resolve().stem if options.init else usual)
    epochs = options.epochs
    if epochs is None and options.minutes is None:
        epochs = SHAPES_EPOCHS if options.data == "shapes" else EPOCHS
    lr, weight_decay = RATES[options.optimizer]
    images = len(data.train)
    batch_size = options.batch_size or min(64, math.ceil(images / 8))
    if batch_size > images:
        whose = f" of --recipe {options.recipe}" if options.recipe else ""
        raise UsageError(
            f"--batch-size {batch_size}{whose} is larger than the {images} training images of {data.name}: "
            f"give --batch-size {images} or less"
        )
    if options.val_fraction is None and not data.own_test:
        options = dataclasses.replace(options, val_fraction=VAL_FRACTION)
    augment = options.freeze != ALL_BUT_HEAD if options.augment is None else options.augment
    return dataclasses.replace(
        options,
        model=model,
        augment=augment,
        out=options.out or str(Path("runs") / f"{data.name}-{model}"),
        epochs=epochs,
        batch_size=batch_size,
        lr=lr if options.lr is None else options.lr,
        weight_decay=weight_decay if options.weight_decay is None else options.weight_decay,
    )


def start_run(options: TrainConfig, data: Data, checkpoint: Checkpoint | None, started: float) -> Position:
    """Train in a new run directory."""
    out = Path(options.out)
    run_directory.check_unused(out)
    steps_per_epoch = len(data.train) // options.batch_size
    plan = make_plan((options.epochs or 1) * steps_per_epoch, steps_per_epoch, options.warmup)
    display = Display()
    data = prepare(options, data, checkpoint, display)
    trainer = Trainer(options, data, plan, display, checkpoint)
    introduce(trainer, checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    if options.minutes is not None:
        deadline = Deadline(Trainer(options, data, plan, display, checkpoint), started + 60 * options.minutes)
        trainer.deadline, trainer.plan = deadline, deadline.plan
        display.line(f"about {deadline.plan.total_steps} steps fit into {clock(60 * options.minutes)}")
    if checkpoint is not None:
        checkpoint.state.clear()  # the trainer has its own copy
    run_directory.write_config(out, trainer.config())
    run_directory.write_metrics(out, [])
    trainer.save_last()  # from here on the run can be resumed, whatever happens to it
    return finish(trainer)


def resume_run(out: Path, given: dict[str, Any]) -> Position:
    """Go on with the run at `out`; a finished one is left as it is."""
    config = run_directory.read_config(out)
    position = read_position(out / LAST)
    options = run_directory.resumed_options(out, config, given)
    if options.init is not None:  # the weights it began with may be gone; its own are of the same model
        options = dataclasses.replace(options, init=str(out / LAST))
    display = Display()
    same_source = options.data == config["options"]["data"]
    if not (position.finished and same_source):  # a finished run needs its images no more
        checkpoint = open_init(options)
        data = load(options, checkpoint)
        run_directory.check_same_data(out, config, data)
    if position.finished:
        display.line(f"{out} is finished: its {position.epoch} epochs are done, nothing was changed")
        return position
    data = prepare(options, data, checkpoint, display)
    trainer = Trainer(options, data, Plan(**config["plan"]), display, checkpoint)
    if checkpoint is not None:
        checkpoint.state.clear()  # the trainer has its own copy
    trainer.restore()
    display.line(f"going on with {out} after step {position.step} of {trainer.plan.total_steps}")
    run_directory.write_metrics(out, position.history)  # lines of epochs after the checkpoint will come again
    return finish(trainer)


def prepare(options: TrainConfig, data: Data, checkpoint: Checkpoint | None, display: Display) -> Data:
    """The data that the steps see, on the device that runs them if it fits there.

    Where nothing but the head changes from epoch to epoch, it is the features before the head.
    """
    device = pick_device(options.device)
    if not reuses_features(options):
        return resident(data, device)
    images = len(data.train) + len(data.validation)
    display.line(f"only the head learns: computing the features of {images} images once")
    model = make_model(options, data, checkpoint).to(device)
    return resident(with_features(Backbone(model), data, options.threads, options.precision), device)


def introduce(trainer: Trainer, checkpoint: Checkpoint | None) -> None:
    """Say what will be trained on what, and where."""
    data, options = trainer.data, trainer.options
    height, width = data.image_size
    trainer.display.line(
        f"{options.model} ({trainer.model.num_parameters() / 1e6:.2f} M parameters) on {data.name}: "
        f"{len(data.train)} training and {len(data.validation)} validation images of {height}x{width} "
        f"in {len(data.class_names)} classes"
    )
    if checkpoint is not None:
        head = "its head kept" if keeps_head(checkpoint, data) else f"a new head for {len(data.class_names)} classes"
        trainer.display.line(f"weights of {options.init}, {head}")
    like = trainer.model.parameters()[0].data
    on = system_info.one_line(system_info.examine()) if arrays.on_host(like) else system_info.describe_device(like)
    trainer.display.line(on if options.precision == "fp32" else f"{options.precision} on {on}")
    if skipped := [*data.train.skipped, *data.validation.skipped]:
        trainer.display.line(f"left out {len(skipped)} images that cannot be read, the first is {skipped[0]}")


def finish(trainer: Trainer) -> Position:
    """Run what is left of the plan and say how it ended."""
    with stop_on_signals() as stop:
        trainer.run(stop)
    position, out = trainer.position, trainer.out
    curves = f", curves in {out / run_directory.CURVES}" if (out / run_directory.CURVES).exists() else ""
    trainer.display.line(
        f"best validation accuracy {position.best_accuracy:.2%} (epoch {position.best_epoch}), "
        f"weights in {out / BEST}{curves}"
    )
    return position


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Give a function that tells which of SIGINT and SIGTERM came, if one did; a second one interrupts at once."""
    received: list[int] = []

    def note(signum: int, frame: Any) -> None:
        received.append(signum)
        if len(received) > 1:
            raise KeyboardInterrupt
        if sys.stderr.isatty():  # os.write, because the signal may have interrupted a print
            os.write(sys.stderr.fileno(), b"\nstopping after this step; once more stops at once\n")

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield lambda: None
        return
    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0] if received else None
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
