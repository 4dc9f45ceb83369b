"""From a run's options to its parts: the model, the optimizer, what happens to the images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tinyvit import optim
from tinyvit.backend import arrays
from tinyvit.checkpoints.checkpoint import TRAINING_PREFIXES, Checkpoint, CheckpointError
from tinyvit.checkpoints.native_file import read
from tinyvit.data import Augment, Data, Loader, Split, default_augment, policies
from tinyvit.data.splits import without_augmentation
from tinyvit.distributed import ALONE, Group
from tinyvit.engine.tensor import Array
from tinyvit.errors import UsageError
from tinyvit.evaluation.features import FeatureSplit
from tinyvit.evaluation.metrics import Scores, evaluate
from tinyvit.execution.train_step import TrainStep
from tinyvit.models.registry import create_model
from tinyvit.models.vit import VisionTransformer
from tinyvit.training.config import TrainConfig
from tinyvit.training.finetune import Head, class_weights, freeze, init_head, order_head

SAVE_FEATURE_RUNS_EVERY = 10.0  # seconds: epochs on stored features are shorter than saving the frozen weights


def make_model(options: TrainConfig, data: Data, checkpoint: Checkpoint | None) -> VisionTransformer:
    """The model that `options` name, for the data's images and classes. Raises ValueError where they do not fit.

    With the `checkpoint` of `options.init` it begins with its weights, and with a new head unless `keeps_head`. Raises
    CheckpointError for one that does not fit, UsageError for parts to freeze that it does not have.
    """
    settings: dict[str, Any] = dict(
        image_size=data.image_size,
        in_chans=data.in_chans,
        num_classes=len(data.class_names),
        drop_path=options.drop_path,
        pos_drop_rate=options.dropout,
        proj_drop_rate=options.dropout,
        attn_drop_rate=0.0,  # of these, too, a checkpoint may have some
        drop_rate=0.0,
        **model_settings(options),
    )
    if checkpoint is None:
        assert options.model is not None
        model = create_model(options.model, seed=options.seed, **settings)
    else:
        model = checkpoint.build(**settings).train()
    if checkpoint is not None and keeps_head(checkpoint, data):
        order_head(model, [checkpoint.class_names.index(name) for name in data.class_names])
    else:
        init_head(model, options.head_init, options.seed)
    if options.freeze is not None:
        try:
            freeze(model, options.freeze)
        except ValueError as error:
            raise UsageError(f"--freeze: {error}") from None
    return model


def model_settings(options: TrainConfig) -> dict[str, Any]:
    """The fields of the model's config that `options` give."""
    given = {"patch_size": options.patch_size, "num_heads": options.num_heads}
    return {name: value for name, value in given.items() if value is not None}


def keeps_head(checkpoint: Checkpoint, data: Data) -> bool:
    """Whether the checkpoint's head is for the data's classes, in whatever order."""
    return checkpoint.names_known and sorted(checkpoint.class_names) == sorted(data.class_names)


def make_optimizer(options: TrainConfig, model: VisionTransformer) -> optim.Optimizer:
    """The optimizer that complete options name, with parameter groups."""
    assert options.lr is not None and options.weight_decay is not None
    head_lr_scale = 1.0 if options.head_lr is None else options.head_lr / options.lr
    groups = optim.param_groups(
        model,
        options.weight_decay,
        layer_decay=options.layer_decay,
        head_lr_scale=head_lr_scale,
        adam_lr_scale=options.adam_lr / options.lr if options.optimizer == "muon" else None,
    )
    if options.optimizer == "sgd":
        return optim.SGD(groups, lr=options.lr, momentum=0.9, nesterov=True)
    return {"adam": optim.Adam, "adamw": optim.AdamW, "muon": optim.Muon}[options.optimizer](groups, lr=options.lr)


def make_augmentation(options: TrainConfig, data: Data) -> Augment:
    """What happens to a batch before a step."""
    augment = Augment(data.mean, data.std)
    if options.augment:
        augment = dataclasses.replace(
            default_augment(data),
            policy=policies.parse(options.policy),
            turn=options.rotate,
            zoom=options.zoom,
            erasing=options.erasing,
        )
        if options.flip == "alternate":  # the loader does it, which knows the epoch
            augment = dataclasses.replace(augment, flip=False)
    return dataclasses.replace(augment, mixup=options.mixup, cutmix=options.cutmix, num_classes=len(data.class_names))


# --- all parts of a run -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Parts:
    """What trains: a model with its optimizer, the step that updates it, and the batches.

    Attributes:
        model: the whole model; the steps compute all of it, or its head alone on stored features.
        ema: the averaged weights, None for none.
        evaluate: scores of the model, as it is, on a split.
        save_every: seconds that must pass between two saves, except the last one.
    """

    model: VisionTransformer
    optimizer: optim.Optimizer
    ema: optim.EMA | None
    step: TrainStep
    loader: Loader
    evaluate: Callable[..., Scores | None]
    save_every: float

    def tensors(self) -> dict[str, np.ndarray]:
        """What last.safetensors holds: the weights under their own names, the rest with a prefix."""
        states = {"optimizer": self.optimizer, "ema": self.ema, "step": self.step}
        tensors = self.model.state_dict()
        for prefix, part in states.items():
            if part is not None:
                tensors |= {f"{prefix}.{name}": array for name, array in part.state_dict().items()}
        return tensors

    def restore(self, path: Path) -> None:
        """Take over the tensors of a last.safetensors.

        Raises:
            CheckpointError: it cannot be read, does not fit, or holds values that are not finite.
        """
        states: dict[str, dict[str, np.ndarray]] = {"": {}, "optimizer": {}, "ema": {}, "step": {}}
        for name, array in read(path)[0].items():
            if not np.all(np.isfinite(array)):
                raise CheckpointError(f"{path}: {name} holds values that are not finite")
            prefix, _, rest = name.partition(".")
            if f"{prefix}." in TRAINING_PREFIXES:
                states[prefix][rest] = array
            else:
                states[""][name] = array
        try:
            self.model.load_state_dict(states[""])
            self.optimizer.load_state_dict(states["optimizer"])
            if self.ema is not None:
                self.ema.load_state_dict(states["ema"])
            self.step.load_state_dict(states["step"])
        except ValueError as error:
            raise CheckpointError(f"{path} does not fit the run: {error}") from None


def make_parts(
    options: TrainConfig, data: Data, checkpoint: Checkpoint | None, shards: int, group: Group = ALONE
) -> Parts:
    """The parts of a run.

    Args:
        options: complete ones; see `run.complete`.
        data: images, or the features that its `finetune.Head` reads.
        checkpoint: what `options.init` names.
        shards: the number of shards of a batch on a CPU.
        group: the processes that train together.
    """
    model = make_model(options, data, checkpoint).to(group.device(options.device))
    optimizer = make_optimizer(options, model)
    ema = optim.EMA(model, options.ema) if options.ema else None
    on_features = isinstance(data.train, FeatureSplit)
    trained = Head(model) if on_features else model
    balanced = options.class_weights == "balanced"
    step = TrainStep(
        trained,
        optimizer,
        clip_norm=options.clip_norm or None,
        label_smoothing=options.label_smoothing,
        accumulate=options.accumulate,
        ema=ema,
        seed=options.seed,
        threads=options.threads,
        shards=shards,
        class_weights=class_weights(data.train.labels, len(data.class_names)) if balanced else None,
        precision=options.precision,
        group=group,
    )
    assert options.batch_size is not None
    loader = Loader(
        data.train if options.augment else without_augmentation(data.train),
        options.batch_size,
        transform=unchanged if on_features else make_augmentation(options, data),
        seed=options.seed,
        drop_last=True,
        alternate_flip=bool(options.augment) and options.flip == "alternate",
        repeats=options.repeats,
        device=arrays.device_name(model.parameters()[0].data),
        group=group,
    )

    def evaluation(split: Split, stop: Callable[[], Any] = lambda: None) -> Scores | None:
        scaling = unchanged if on_features else Augment(data.mean, data.std)
        return evaluate(
            trained, split, split.labels, data.class_names, scaling,
            threads=options.threads, precision=options.precision, stop=stop, group=group,
        )  # fmt: skip

    return Parts(model, optimizer, ema, step, loader, evaluation, SAVE_FEATURE_RUNS_EVERY * on_features)


def unchanged(features: Array, labels: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """The transform of batches that need none."""
    return features, labels
