"""What each command does: it calls the package and prints. A command imports what it alone needs."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyvit._version import __version__
from tinyvit.distributed import init
from tinyvit.files.atomic import check_output
from tinyvit.files.text import aligned, nearest, printable
from tinyvit.training.config import FIELDS, UsageError, height_and_width, merge, read_toml

if TYPE_CHECKING:
    from tinyvit.checkpoints.checkpoint import Checkpoint


def opened(args: Namespace) -> Checkpoint:
    """The checkpoint that a command is given."""
    from tinyvit.checkpoints.loading import open_checkpoint

    return open_checkpoint(args.checkpoint, num_heads=args.num_heads)


def train(args: Namespace) -> None:
    file = read_toml(args.config) if args.config else {}
    given = merge(file, {name: value for name, value in vars(args).items() if name in FIELDS})
    if "model" in given:
        known_model(given["model"])
    from tinyvit.training import run

    run.train(given, resume=args.resume, started=args.started)


def eval_(args: Namespace) -> None:
    from tinyvit.backend import arrays
    from tinyvit.data.splits import image_names
    from tinyvit.evaluation import metrics
    from tinyvit.evaluation.probe import probe

    group = init()
    if args.probe and args.split not in (None, "test"):
        raise UsageError(f"--probe learns from the training split, expected --split test, got {args.split}")
    for option in ("confusion", "predictions"):
        check_output(f"--{option}", getattr(args, option))
    checkpoint = opened(args)
    model = checkpoint.build(copy=False).to(group.device(args.device))
    data = metrics.data_for(checkpoint, args.data, args.skip_corrupt, group)
    if group.size > 1:
        asked = {f"--{name}": getattr(args, name) for name in ("split", "probe", "precision")}
        used = {"data set": data.fingerprint, "checksum of the weights": arrays.checksum(checkpoint.state)}
        group.same({"version of tinyvit": __version__, **asked, **used})
    if args.probe:
        parts = {data.test_name: data.test}
        scores, setting = probe(args.probe, checkpoint, model, data, args.precision, group)
        about: dict[str, Any] = {"probe": args.probe, **setting}
        shown = ", ".join(f"{name} {value:g}" for name, value in setting.items())
        what = f"{data.test_name} split of {data.name}, {args.probe} probe ({shown})"
    else:
        data = metrics.held_out_as_in_run(checkpoint, data)
        parts = metrics.chosen_parts(checkpoint, data, args.split)
        of_parts = metrics.evaluate_parts(checkpoint, model, data, parts, args.precision, group)
        scores = metrics.combined(list(of_parts.values()))
        splits = {name: {"images": s.images, "accuracy": s.accuracy} for name, s in of_parts.items()}
        about = {"images": scores.images, "splits": splits}
        counts = [f"{s.images} {name} ({s.accuracy:.2%})" for name, s in of_parts.items()]
        what = f"{data.name}, {', '.join(counts) if counts[1:] else next(iter(parts)) + ' split'}"
    if not group.leads:
        return
    read = [data.train, *parts.values()] if args.probe else parts.values()
    skipped = list(dict.fromkeys(name for part in read for name in part.skipped))
    if args.confusion:
        metrics.write_confusion(args.confusion, scores)
    if args.predictions:
        images = [name for part in parts.items() for name in image_names(*part)]
        metrics.write_predictions(args.predictions, scores, images)
    if args.json:
        print_json(
            {**about, "precision": args.precision, **scores.as_dict(), **skipped_of(args, skipped, data.no_images)}
        )
        return
    what += "" if args.precision == "fp32" else f", in {args.precision}"
    print(printable(f"{what}: {scores.images} images"))
    print(f"{scores.summary}\n")
    rows = [(name, "-" if a is None else f"{a:.2%}", str(n)) for name, a, n in scores.per_class]
    print_table([("class", "accuracy", "images"), *rows])
    print_skipped(skipped, data.no_images)


def predict(args: Namespace) -> None:
    from tinyvit import nn
    from tinyvit.backend.devices import pick_device
    from tinyvit.backend.memory import drop_pages
    from tinyvit.checkpoints.readers.safetensors import mapped
    from tinyvit.data.base import DataError
    from tinyvit.data.splits import SKIP_HINT
    from tinyvit.evaluation.classify import image_paths, likeliest, run_on_images
    from tinyvit.evaluation.export import check_features_path, overlay_paths, write_features, write_overlays
    from tinyvit.evaluation.metrics import check_head
    from tinyvit.evaluation.zero_shot import read_labels
    from tinyvit.files.bar import bar
    from tinyvit.models.vit import Block

    with mapped():
        checkpoint = opened(args)
    images, no_images = image_paths(args.images)
    overlays = overlay_paths(args.attention, images) if args.attention else []
    if args.embed:
        check_features_path(args.embed, Path(args.checkpoint))
    labels = read_labels(args.labels, checkpoint.similarity) if args.labels else None
    if not (args.attention or args.embed or labels):
        check_head(checkpoint)
    model = checkpoint.build(copy=False).to(pick_device(args.device))

    def drop(module: nn.Module, _: Any) -> None:
        """Of the mapped weights, hold those of one block at a time."""
        for p in module.parameters() if isinstance(module, Block) else []:
            drop_pages(p.data)

    with nn.forward_pre_hook(drop), bar("images", len(images)) as done:
        try:
            outputs = run_on_images(model, images, args.precision, args.skip_corrupt and len(images) > 1, done)
        except DataError as error:
            raise DataError(f"{error}{SKIP_HINT if images[1:] else ''}") from None
    out = outputs.unreadable
    if len(out) == len(images):
        raise DataError(f"none of the {len(images)} images can be read, the first is {images[0]}")
    skipped = [images[i] for i in sorted(out)]
    images = [image for i, image in enumerate(images) if i not in out]
    overlays = [path for i, path in enumerate(overlays) if i not in out]
    if args.embed:
        write_features(args.embed, outputs, images, checkpoint, args.checkpoint)
    with bar("attention", len(overlays)) as done:
        write_overlays(overlays, images[: len(overlays)], model, done)

    names = labels.names if labels else checkpoint.class_names
    probabilities = labels.probabilities(outputs) if labels else outputs.probabilities
    predictions: list[dict[str, Any]] = []
    for i, (path, p) in enumerate(zip(images, probabilities, strict=True)):
        classes = [{"name": name, "probability": share} for name, share in likeliest(names, p, args.top)]
        predictions.append({"image": path, "classes": classes})
        if overlays:
            predictions[i]["attention"] = str(overlays[i])
    if args.json:
        print_json({"predictions": predictions, **skipped_of(args, skipped, no_images)})
        return
    width = max((len(printable(c["name"])) for each in predictions for c in each["classes"]), default=0)
    for each in predictions:
        print(printable(each["image"]))
        for c in each["classes"]:
            print(f"  {printable(c['name']):{width}}  {c['probability']:7.2%}")
        if overlays:
            print(printable(f"  attention in {each['attention']}"))
    if args.embed:
        print(printable(f"features in {args.embed}"))
    print_skipped(skipped, no_images)


def summary(args: Namespace) -> None:
    from tinyvit.models.registry import model_config
    from tinyvit.models.summary import summarise

    if Path(args.checkpoint).exists() or args.checkpoint.startswith("hf:"):
        config = opened(args).config
    else:
        heads = {} if args.num_heads is None else {"num_heads": args.num_heads}
        config = model_config(known_model(args.checkpoint), **heads)
    found = summarise(config, image_size=None if args.image_size is None else height_and_width(args.image_size))
    print_json(found.as_dict()) if args.json else print(found.as_table())


def convert(args: Namespace) -> None:
    from tinyvit.checkpoints.convert import convert

    convert(Path(args.checkpoint), args.path, args.to, num_heads=args.num_heads)
    print(printable(f"{args.path}: {args.checkpoint} in the layout of {args.to}"))


def export(args: Namespace) -> None:
    from tinyvit.checkpoints.onnx_file import write_onnx

    inside = {"preprocess": args.preprocess, "softmax": args.softmax}
    write_onnx(opened(args), args.path, **inside, precision=args.precision)
    print(printable(f"{args.path}: {args.checkpoint} as an ONNX graph"))


def report(args: Namespace) -> None:
    from tinyvit.backend.devices import pick_device
    from tinyvit.viz.report import write_report

    page = write_report(args.checkpoint, args.data, args.out, pick_device(args.device), args.skip_corrupt)
    print(printable(f"report in {page}"))


def compare(args: Namespace) -> None:
    from tinyvit.viz.compare import read_runs, rows, write_comparison

    runs = read_runs(args.runs)
    columns = rows(runs)
    headings = list(next(iter(columns.values())))
    print_table([("", *columns), *((name, *(column[name] for column in columns.values())) for name in headings)])
    if args.out:
        write_comparison(runs, args.out)
        print(printable(f"comparison in {args.out}"))


def watch(args: Namespace) -> None:
    from tinyvit.viz import watch

    watch.watch(args.run_directory)


def plot(args: Namespace) -> None:
    from tinyvit.training import run_directory

    print(printable(f"curves in {run_directory.plot(args.run_directory)}"))


def recipes(args: Namespace) -> None:
    from tinyvit.training.recipes import FILES, read_recipe

    rows: list[tuple[str, ...]] = [("name", "data", "model", "length", "device", "accuracy")]
    for name in FILES:
        recipe = read_recipe(name)
        o = recipe.options
        length = f"{o['minutes']:g} minutes" if "minutes" in o else f"{o['epochs']} epochs"
        rows.append((name, o.get("data", "any"), o.get("model", "any"), length, recipe.device, recipe.accuracy))
    print_table(rows)


def models(args: Namespace) -> None:
    from tinyvit.models.registry import list_models, model_config
    from tinyvit.models.summary import summarise

    rows: list[tuple[str, ...]] = [("name", "width", "depth", "heads", "stem", "patch", "image", "parameters")]
    for name in list_models():
        c = model_config(name)
        patch, image = (f"{h}x{w}" for h, w in (c.patch_size, c.image_size))
        if c.conv_chans is not None:
            before = f"{len(c.conv_chans) + 1} conv"
        else:
            before = "none" if c.resnet_layers is None else "-".join(map(str, c.resnet_layers)) or "stem"
        sizes = (c.embed_dim, c.depth, c.num_heads, before, patch, image, f"{summarise(c).parameters:,}")
        rows.append((name, *map(str, sizes)))
    print_table(rows)


def info(args: Namespace) -> None:
    from tinyvit.execution import system_info

    found = system_info.collect()
    print_json(found.to_dict()) if args.json else print(system_info.as_table(found))


def known_model(name: str) -> str:
    """`name`, which must be a model's. Raises UsageError."""
    from tinyvit.models.registry import list_models

    if name not in list_models():
        raise UsageError(f"there is no model {name!r}{nearest(name, list_models())}; `tinyvit models` lists them")
    return name


def print_json(value: dict[str, Any]) -> None:
    """Print JSON; where standard output is not UTF-8, with JSON's own escapes."""
    encoding = (sys.stdout.encoding or "utf-8").lower().replace("-", "")
    print(json.dumps(value, indent=2, ensure_ascii=encoding != "utf8"))


def skipped_of(args: Namespace, images: Sequence[str], no_images: Sequence[str]) -> dict[str, Sequence[str]]:
    """What JSON says of --skip-corrupt, and of files that are no images if there are any."""
    return {**({"skipped": images} if args.skip_corrupt else {}), **({"no_images": no_images} if no_images else {})}


def print_skipped(images: Sequence[str], no_images: Sequence[str]) -> None:
    """What --skip-corrupt left out, if it did, and files that are no images, if there are any."""
    from tinyvit.data.splits import left_out, passed_over

    if images:
        print(printable(left_out(images)))
    if no_images:
        print(printable(passed_over(no_images)))


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns that line up: the first to the left, the others to the right."""
    print("\n".join(aligned([[printable(cell) for cell in row] for row in rows])))
