"""From options to a trained model: the data, the model and the run directory; starting and resuming a run."""

from __future__ import annotations

import dataclasses
import math
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinyvit._version import __version__
from tinyvit.backend import arrays, devices, parallel
from tinyvit.backend.devices import pick_device
from tinyvit.checkpoints.checkpoint import Checkpoint, describe
from tinyvit.checkpoints.loading import open_checkpoint
from tinyvit.data import Data, cifar10_batches, load_data, resident
from tinyvit.data.sources.listing import SMALL
from tinyvit.data.splits import hold_out, left_out, passed_over
from tinyvit.distributed import ALONE, Group, init
from tinyvit.distributed.group import SLOW
from tinyvit.errors import UsageError
from tinyvit.evaluation.features import with_features
from tinyvit.execution import system_info
from tinyvit.models.config import ViTConfig
from tinyvit.models.inspection import Features
from tinyvit.models.preprocessing import Preprocessing
from tinyvit.models.registry import model_config
from tinyvit.models.vit import VisionTransformer
from tinyvit.training.build import Parts, keeps_head, make_model, make_parts, model_settings
from tinyvit.training.config import (
    ALL_BUT_HEAD,
    EPOCHS,
    RATES,
    VAL_FRACTION,
    TrainConfig,
    channel_values,
    check_pairs,
    check_same,
    flag,
    height_and_width,
    reuses_features,
    with_recipe,
)
from tinyvit.training.display import Display, clock
from tinyvit.training.progress import Progress
from tinyvit.training.recipes import best_recipe, read_recipe
from tinyvit.training.run_directory import Record, RunDirectory
from tinyvit.training.schedule import RunLength
from tinyvit.training.signals import stop_on_signals
from tinyvit.training.tensorboard import check_log, open_log
from tinyvit.training.time_budget import TimeBudget
from tinyvit.training.trainer import Trainer


def train(given: Mapping[str, Any], *, resume: bool = False, started: float | None = None) -> Progress:
    """Train in a new run directory or, with `resume`, continue in one.

    Args:
        given: fields of TrainConfig.
        resume: continue the run in `given["out"]`.
        started: when the time of `minutes` began, of time.monotonic(); now if None.

    Returns:
        where the run ended.

    Raises:
        UsageError, TrainError, EvaluationError, CheckpointError, DataError, OSError: each with a message of one line.
        ValueError: a model that does not fit the images.
        Stopped: SIGINT or SIGTERM came, and the run was saved.
    """
    started = time.monotonic() if started is None else started
    group = init()
    asked = {flag(name): str(value) for name, value in given.items()}
    group.same({"version of tinyvit": __version__, "--resume": resume, **asked})
    with Display(shown=group.leads) as display:
        if resume and given.get("out"):
            return resume_run(RunDirectory(given["out"], group.leads), given, display, group)
        recipe = best_recipe(given, on_gpu=pick_device(given.get("device", "auto")) != "cpu")
        chosen = {**given, "recipe": recipe} if recipe else given
        check_pairs(chosen)
        options = TrainConfig(**with_recipe(chosen))
        if options.out and not resume:
            RunDirectory(options.out, group.leads).check_unused()
        check_log(options.log)
        if options.device != "auto":
            pick_device(options.device)  # before data are fetched for it
        checkpoint = None if options.init is None else open_checkpoint(options.init, num_heads=options.num_heads)
        check_model(options, checkpoint)
        data = load(options, checkpoint, display, group)
        options = complete(options, data)
        assert options.out is not None
        if resume:  # the run has its default name
            return resume_run(RunDirectory(options.out, group.leads), given, display, group)
        return start_run(options, data, checkpoint, started, display, group)


# --- the data and the options -----------------------------------------------------------------------------------------


def wanted_size(options: TrainConfig, checkpoint: Checkpoint | None) -> tuple[int, int] | None:
    """(height, width) of the images as the options or the model say; None leaves it to the data."""
    if options.image_size is not None:
        return height_and_width(options.image_size)
    if checkpoint is not None:
        return checkpoint.config.image_size
    return None if options.model is None else model_config(options.model).image_size


def check_model(options: TrainConfig, checkpoint: Checkpoint | None) -> None:
    """Refuse sizes that make no model, before data are read. Raises ValueError."""
    settings = {"image_size": wanted_size(options, checkpoint), **model_settings(options)}
    if checkpoint is not None:
        checkpoint.config.replace(**settings)
    elif options.model is not None:
        model_config(options.model, **settings)


def load(options: TrainConfig, checkpoint: Checkpoint | None, display: Display, group: Group = ALONE) -> Data:
    """The data set, prepared as for the options and the checkpoint. Raises DataError, UsageError."""
    for first in (group.leads, group.local_rank == 0):  # one process of each machine; some may share a directory
        if first and options.data == "cifar10":
            display.doing("looking for CIFAR-10")
            cifar10_batches(options.data, None)
        group.exchange(None, SLOW)
    display.doing(f"reading {options.data}")
    statistics = None if checkpoint is None else checkpoint.preprocessing.statistics
    if options.mean is not None and options.std is not None:
        statistics = channel_values(options.mean), channel_values(options.std)
    data = load_data(
        options.data,
        image_size=wanted_size(options, checkpoint),
        val_fraction=VAL_FRACTION if options.val_fraction is None else options.val_fraction,
        seed=options.seed,
        skip_corrupt=options.skip_corrupt,
        fit_options=None if checkpoint is None else checkpoint.preprocessing.fit,
        statistics=statistics if reuses_features(options) else None,
        group=group,
    )
    if options.val_fraction is not None and data.val is not None:
        raise UsageError(
            f"--val-fraction {options.val_fraction} holds out images, "
            f"but {data.name} has validation images of its own: leave the option out"
        )
    if options.val_fraction is not None and data.own_test:
        data = hold_out(data, options.val_fraction, options.seed)
    if statistics is None:
        return data
    if len(statistics[0]) != data.in_chans:
        raise UsageError(f"--mean and --std have {len(statistics[0])} values, the images {data.in_chans} channels")
    return dataclasses.replace(data, mean=statistics[0], std=statistics[1])


def complete(options: TrainConfig, data: Data) -> TrainConfig:
    """`options` with all that is chosen by the data. Raises UsageError."""
    small = max(data.image_size) <= SMALL
    default_model = "vit_micro_patch4_32" if small else "vit_tiny_patch16_224"
    model = options.model or (Path(options.init).resolve().stem if options.init else default_model)
    epochs = EPOCHS if options.epochs is None and options.minutes is None else options.epochs
    images, repeats = len(data.train), options.repeats
    batch_size = options.batch_size or math.ceil(min(64, images / 8) / repeats) * repeats
    if batch_size % repeats:
        fitting = max(1, batch_size // repeats) * repeats
        raise UsageError(f"--batch-size {batch_size}: expected a multiple of --repeats {repeats}, such as {fitting}")
    if batch_size > images:
        whose = f" of --recipe {options.recipe}" if options.recipe else ""
        raise UsageError(
            f"--batch-size {batch_size}{whose} is larger than the {images} training images of {data.name}: "
            f"give --batch-size {images} or less"
        )
    lr, weight_decay = RATES[options.optimizer]
    height, width = data.image_size
    held_out = VAL_FRACTION if options.val_fraction is None and not data.own_test else options.val_fraction
    return dataclasses.replace(
        options,
        model=model,
        augment=options.freeze != ALL_BUT_HEAD if options.augment is None else options.augment,
        out=options.out or str(Path("runs") / f"{data.name}-{model}"),
        epochs=epochs,
        batch_size=batch_size,
        image_size=height if height == width else f"{height}x{width}",
        lr=lr if options.lr is None else options.lr,
        weight_decay=weight_decay if options.weight_decay is None else options.weight_decay,
        val_fraction=held_out,
    )


# --- starting and resuming --------------------------------------------------------------------------------------------


def start_run(
    options: TrainConfig, data: Data, checkpoint: Checkpoint | None, started: float, display: Display, group: Group
) -> Progress:
    """Train in a new run directory; `options` are complete."""
    assert options.out is not None and options.batch_size is not None
    directory = RunDirectory(options.out, group.leads)
    directory.check_unused()
    check_together(group, options, data, checkpoint)
    steps_per_epoch = len(data.train) // options.batch_size
    length = RunLength.of((options.epochs or 1) * steps_per_epoch, steps_per_epoch, options.warmup)
    data, seconds = on_device(options, data, checkpoint, display, group)
    threads = options.threads or group.threads or parallel.available_cores()
    shards = group.size * threads  # into which all processes cut a batch on a CPU
    parts = make_parts(options, data, checkpoint, shards, group)
    introduce(options, parts, data, checkpoint, display)
    if group.leads:
        directory.path.mkdir(parents=True, exist_ok=True)
    with directory.locked():
        directory.check_unused()  # another process may have started here meanwhile
        directory.remove_leftovers()
        budget = None
        if options.minutes is not None:
            display.doing("timing training steps")
            spent = make_parts(options, data, checkpoint, shards, group)
            end = started + 60 * options.minutes
            budget = TimeBudget.rehearse(end, spent, data.validation, directory, options.warmup)
            length = budget.length
            steps = f"{length.total_steps} step{'s fit' if length.total_steps > 1 else ' fits'}"
            display.line(f"about {steps} into {clock(60 * options.minutes)}")
        progress = Progress(seconds=seconds)
        trainer = make_trainer(options, data, parts, length, shards, directory, display, progress, budget)
        if checkpoint is not None:
            checkpoint.state.clear()  # the model has its own copy
        directory.write_config(trainer.config, length)
        directory.write_metrics([])
        trainer.save()  # from here on the run can be resumed, whatever happens to it
        return finish(trainer, options.log)


def check_together(group: Group, options: TrainConfig, data: Data, checkpoint: Checkpoint | None) -> None:
    """Refuse processes that would train something else than the others. Raises DistributedError, UsageError."""
    given = {flag(name): value for name, value in dataclasses.asdict(options).items()}
    given["data set"] = data.fingerprint
    if group.size > 1 and checkpoint is not None:
        given["checksum of the weights"] = arrays.checksum(checkpoint.state)
    if group.size > 1 and pick_device(options.device) == "cpu":
        given |= system_info.arithmetic(options.precision)
    group.same(given)
    if (batch := options.batch_size or 0) < group.size:
        raise UsageError(f"--batch-size {batch} is less than one image for each of {group.size} processes")


def resume_run(directory: RunDirectory, given: Mapping[str, Any], display: Display, group: Group) -> Progress:
    """Continue the run in `directory`, whose record decides everything that `given` may not change."""
    record, progress = directory.read_record(), Progress.read(directory.last)
    group.same({f"{directory.last} (its step and seconds)": [progress.step, progress.seconds]})
    options, length = resumed_options(directory, record, given), record.length
    check_log(options.log)
    if options.epochs is not None and options.epochs != record.options["epochs"]:
        length = length.with_total(options.epochs * length.steps_per_epoch)
        progress.finished = progress.step >= length.total_steps
    finished = f"{directory.path} is finished, after {progress.step} steps: nothing was changed"
    same_source = options.data == record.options["data"]
    if progress.finished and same_source:  # the images of a finished run are not needed
        display.line(finished)
        return progress
    checkpoint = None
    if options.init is not None:  # the original weights may be gone; the run's own are those of the same model
        checkpoint = open_checkpoint(directory.last)
    data = load(options, checkpoint, display, group)
    check_together(group, options, data, checkpoint)
    if record.fingerprint != data.fingerprint:
        other = f"{data.name}, which holds other images" if data.name == record.data_name else data.name
        raise UsageError(
            f"{directory.path} was started with the data set {record.data_name}, not {other}: choose another --out"
        )
    if progress.finished:
        display.line(finished)
        return progress
    with directory.locked():
        directory.remove_leftovers()
        data, seconds = on_device(options, data, checkpoint, display, group)
        shards = record.shards
        if shards % group.size:
            recorded, shards = shards, -(-shards // group.size) * group.size
            display.line(f"a batch has {shards} shards in place of {recorded}: rounding will differ")
        parts = make_parts(options, data, checkpoint, shards, group)
        if checkpoint is not None:
            checkpoint.state.clear()  # the model has its own copy
        parts.restore(directory.last)
        group.exchange(None, SLOW)  # all have read it, before it is written again
        progress.seconds += seconds
        trainer = make_trainer(options, data, parts, length, shards, directory, display, progress)
        display.line(f"continuing {directory.path} after step {progress.step} of {length.total_steps}")
        if length != record.length or shards != record.shards:
            directory.write_config(trainer.config, length)
        directory.write_metrics(progress.history)  # drops the rows of epochs after the checkpoint
        return finish(trainer, options.log)


def resumed_options(directory: RunDirectory, record: Record, given: Mapping[str, Any]) -> TrainConfig:
    """The recorded options, with those of `given` that may change. Raises UsageError for the others."""
    recorded = record.options
    more_epochs = given.get("epochs") is not None and given["epochs"] > (recorded["epochs"] or math.inf)
    if more_epochs and recorded["schedule"] != "constant":
        raise UsageError(
            f"{directory.path} was started with --epochs {recorded['epochs']}, where its learning rate ends: "
            f"start a new run with --init {directory.path}"
        )
    fixed = {name: value for name, value in given.items() if not (more_epochs and name == "epochs")}
    check_same(recorded, fixed, directory.path)
    return TrainConfig(**{**recorded, **given, "out": str(directory.path)})


def on_device(
    options: TrainConfig, data: Data, checkpoint: Checkpoint | None, display: Display, group: Group
) -> tuple[Data, float]:
    """The data that the steps see, on the device that runs them if they fit there.

    These are the features before the head where nothing but the head changes from epoch to epoch. Beside them stand the
    seconds of training that went into them.
    """
    device = group.device(options.device)
    if not reuses_features(options):
        return resident(data, device), 0.0
    begun = time.monotonic()
    images = len(data.train) + len(data.validation)
    display.line(f"only the head learns: computing the features of {images} images once")
    display.doing("computing features")
    model = make_model(options, data, checkpoint).to(device)
    body = Features(model, distilled=True)
    features = with_features(body, data, options.threads, options.precision, group)
    return resident(features, device), time.monotonic() - begun


def make_trainer(
    options: TrainConfig,
    data: Data,
    parts: Parts,
    length: RunLength,
    shards: int,
    directory: RunDirectory,
    display: Display,
    progress: Progress,
    budget: TimeBudget | None = None,
) -> Trainer:
    """The trainer of a run, with what its files say of it; arguments as for `Trainer`."""
    split = {"val_fraction": options.val_fraction or VAL_FRACTION, "seed": options.seed}
    split |= {"images": data.drawn_from} if data.drawn_from else {}
    split["held_out"] = data.own_test and data.drawn_from > 0
    preprocessing = Preprocessing(data.mean, data.std, **data.fit_options)
    description = describe(parts.model.config, data.class_names, preprocessing, split)
    sizes = {"train": len(data.train), "val": len(data.validation), "test": len(data.test)}
    config = {
        "options": dataclasses.asdict(options),
        "shards": shards,
        "data": {"name": data.name, "fingerprint": data.fingerprint, **sizes},
        "versions": {"tinyvit": __version__, "numpy": np.__version__, "python": platform.python_version()},
        "device": devices.describe_device(parts.step.parameters[0].data),
        **description,
    }
    return Trainer(options, data, parts, length, directory, display, config, description, budget, progress)


def introduce(options: TrainConfig, parts: Parts, data: Data, checkpoint: Checkpoint | None, display: Display) -> None:
    """Say what will be trained on what, and where."""
    height, width = data.image_size
    if options.recipe:
        recipe = read_recipe(options.recipe)
        where = "" if recipe.device == "any" else f" on {recipe.device}"
        display.line(f"recipe {recipe.name}; as it is{where}: {recipe.accuracy}")
    display.line(
        f"{options.model} ({parameters(parts.model)}) on {data.name}: "
        f"{len(data.train)} training and {len(data.validation)} validation images of {height}x{width} "
        f"in {len(data.class_names)} classes"
    )
    if checkpoint is not None:
        head = "its head kept" if keeps_head(checkpoint, data) else f"a new head for {len(data.class_names)} classes"
        before, now = map(_patches, (checkpoint.config, parts.model.config))
        resized = "" if before == now else f" resized from {before} to {now}"
        display.line(f"weights of {options.init}{resized}, {head}")
    like = parts.step.parameters[0].data
    on_host = arrays.on_host(like)
    if not (alone := parts.step.group.size == 1):
        display.line(parts.step.group.describe(options.batch_size or 0, parts.step.threads if on_host else None))
    where = system_info.one_line(system_info.collect(), alone) if on_host else devices.describe_device(like)
    slow = ": slower than fp32 on this processor" if on_host and parts.step.precision.dtype is not None else ""
    display.line(where if options.precision == "fp32" else f"{options.precision} on {where}{slow}")
    if skipped := dict.fromkeys([*data.train.skipped, *data.validation.skipped]):
        display.line(left_out(list(skipped)))
    if data.no_images:
        display.line(passed_over(data.no_images))


def _patches(config: ViTConfig) -> str:
    (rows, columns), (height, width) = config.grid_size, config.patch_size
    return f"{rows}x{columns} patches of {height}x{width} pixels"


def parameters(model: VisionTransformer) -> str:
    """The number of parameters, and how many of them learn if not all do."""
    learning = sum(p.size for p in model.parameters() if p.requires_grad)
    some = "" if learning == model.num_parameters() else f", {learning:,} of them learn"
    return f"{model.num_parameters() / 1e6:.2f} M parameters{some}"


def finish(trainer: Trainer, log_kind: str) -> Progress:
    """Train to the end of the run and say how it ended."""
    progress, directory = trainer.progress, trainer.directory
    log_kind = log_kind if directory.writes else "none"
    with stop_on_signals() as stop, open_log(log_kind, directory.path, progress.step) as log:
        trainer.run(stop, log)
    curves = f", curves in {directory.curves}"
    if not directory.curves.exists():
        curves = f'; for curves: pip install "tinyvit[plot]" and tinyvit plot {directory.path}'
    trainer.display.line(
        f"best validation accuracy {progress.best_accuracy:.2%} (epoch {progress.best_epoch}), "
        f"weights in {directory.best}{curves}"
    )
    return progress
