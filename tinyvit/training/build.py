"""From a run's options to its parts: the model, the optimizer, what happens to the images."""

from __future__ import annotations

import dataclasses
from typing import Any

from tinyvit import optim
from tinyvit.checkpoints.checkpoint import Checkpoint
from tinyvit.data import Augment, Data, default_augment
from tinyvit.models.registry import create_model
from tinyvit.models.vit import VisionTransformer
from tinyvit.training.config import TrainConfig, UsageError
from tinyvit.training.finetune import freeze, init_head, order_head


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
    )
    if options.patch_size is not None:
        settings["patch_size"] = options.patch_size
    if checkpoint is None:
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


def keeps_head(checkpoint: Checkpoint, data: Data) -> bool:
    """Whether the checkpoint's head is for the data's classes, in whatever order."""
    return checkpoint.names_known and sorted(checkpoint.class_names) == sorted(data.class_names)


def make_optimizer(options: TrainConfig, model: VisionTransformer) -> optim.Optimizer:
    head_lr_scale = 1.0 if options.head_lr is None else options.head_lr / options.lr
    groups = optim.param_groups(
        model, options.weight_decay, layer_decay=options.layer_decay, head_lr_scale=head_lr_scale
    )
    if options.optimizer == "sgd":
        return optim.SGD(groups, lr=options.lr, momentum=0.9, nesterov=True)
    return {"adam": optim.Adam, "adamw": optim.AdamW}[options.optimizer](groups, lr=options.lr)


def make_augmentation(options: TrainConfig, data: Data) -> Augment:
    """What happens to a batch before a step."""
    augment = default_augment(data) if options.augment else Augment(data.mean, data.std)
    return dataclasses.replace(augment, mixup=options.mixup, cutmix=options.cutmix, num_classes=len(data.class_names))
