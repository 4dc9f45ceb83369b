"""The command line: reading arguments, calling the package, printing. A command imports what it alone needs."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tinyvit.distributed import ALONE, DistributedError, Failed, init
from tinyvit.files.text import aligned, printable
from tinyvit.training.config import (
    FIELDS,
    UsageError,
    flag,
    height_and_width,
    image_size,
    merge,
    nearest,
    one_of,
    read_toml,
    whole,
)

if TYPE_CHECKING:
    from tinyvit.data import Data, Split
    from tinyvit.evaluation.metrics import Scores


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, exit status 2 and no usage text."""

    commands: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        raise UsageError(re.sub(r"^argument (\S+): ", r"\1: ", message))


def typed(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A reader whose ValueError argparse shows as it is."""

    def wrapped(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return wrapped


def make_parser() -> Parser:
    parser = Parser(prog="tinyvit", description="Vision Transformers on NumPy and CuPy.", allow_abbrev=False)
    from tinyvit._version import __version__

    parser.add_argument("--version", action="version", version=f"tinyvit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)

    def command(name: str, run: Callable[[argparse.Namespace], None], meaning: str, **operands: str) -> Parser:
        sub = commands.add_parser(name, help=meaning, description=meaning, allow_abbrev=False)
        sub.set_defaults(run=run, parser=sub)
        for operand, metavar in operands.items():
            sub.add_argument(operand, metavar=metavar)
        return sub

    def option(
        subs: Sequence[Parser], name: str, metavar: str, meaning: str, parse: Callable[[str], Any] = str, **more: Any
    ) -> None:
        for sub in subs:
            sub.add_argument(name, metavar=metavar, help=meaning, type=typed(parse), **more)

    def switch(subs: Sequence[Parser], name: str, meaning: str) -> None:
        for sub in subs:
            sub.add_argument(name, action="store_true", help=meaning)

    def described(name: str) -> tuple[str, Callable[[str], Any]]:
        """The meaning and the reader of an option of train."""
        return FIELDS[name].metadata["help"], FIELDS[name].metadata["parse"]

    train = command("train", run_train, "Train a model on a data set, into a run directory.")
    length = train.add_mutually_exclusive_group()
    for name, field in FIELDS.items():
        target = length if name in ("epochs", "minutes") else train
        meaning, parse = described(name)
        meaning = meaning.replace("%", "%%")
        if parse is bool:
            kind: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        else:
            meaning += "" if field.default is None else f" (default: {field.default})"
            kind = {"type": typed(parse), "metavar": field.metadata["metavar"]}
        target.add_argument(flag(name), default=argparse.SUPPRESS, help=meaning, **kind)
    switch([train], "--resume", "go on with the run in --out where it stopped")
    option([train], "--config", "FILE.toml", "options from a file; those given here count more")

    ev = command("eval", run_eval, "Measure a model's accuracy on a data set.", checkpoint="RUN|CKPT")
    option([ev], "--data", "SRC", *described("data"), required=True)
    splits = one_of("train", "val", "test", "all")
    option([ev], "--split", "NAME", "train, val, test or all (default: every image of SRC)", splits)
    probes = "measure features instead: knn or linear, on the training split, for any classes"
    option([ev], "--probe", "KIND", probes, one_of("knn", "linear"))
    option([ev], "--confusion", "FILE.csv", "write how often each class was taken for each")
    option([ev], "--predictions", "FILE.csv", "write the true and predicted class of each image")
    switch([ev], "--skip-corrupt", described("skip_corrupt")[0])

    predict = command("predict", run_predict, "Name what images show.", checkpoint="RUN|CKPT")
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="files, or directories of images")
    option([predict], "--top", "K", "how many classes (default: 5)", whole(1), default=5)
    option(
        [predict], "--labels", "FILE.npz", "classes by the text embeddings of their names, for CLIP and SigLIP models"
    )
    option([predict], "--attention", "DIR", "draw into DIR each image beside where in it the model looks")
    option([predict], "--embed", "FILE.npz", "write the features before the head, to search by likeness")

    summary = command(
        "summary", run_summary, "List a model's layers, parameters, FLOPs and memory.", model="NAME|RUN|CKPT"
    )
    option([summary], "--image-size", "S|HxW", "for images of another size", image_size)

    convert = command("convert", run_convert, "Write a checkpoint in the layout of another library, or in ours.")
    convert.add_argument("checkpoint", metavar="SRC", help="a run or a checkpoint")
    convert.add_argument("path", metavar="DST", help="a new directory; for tinyvit and timm also a .safetensors file")
    layouts = one_of("tinyvit", "timm", "huggingface")
    option([convert], "--to", "LAYOUT", "tinyvit, timm or huggingface", layouts, required=True)

    onnx = "Write an ONNX file, which other runtimes execute (extra: onnx)."
    export = command("export", run_export, onnx, checkpoint="RUN|CKPT", path="FILE.onnx")
    switch([export], "--preprocess", "take pixels from 0 to 255 and normalise them inside")
    switch([export], "--softmax", "give probabilities in the place of logits")
    option([export], "--precision", "KIND", "fp32 or fp16", one_of("fp32", "fp16"), default="fp32")

    about = "Write one HTML page with all that is known about a run or a checkpoint."
    report = command("report", run_report, about, checkpoint="RUN|CKPT")
    option([report], "--data", "SRC", "whose test images are measured (default: the run's data)")
    option([report], "--out", "FILE.html", "the page (default: report.html in the run)")

    compare = command("compare", run_compare, "Show in which settings runs differ, and how well each did.")
    compare.add_argument("runs", nargs="+", metavar="RUN")
    option([compare], "--out", "FILE.html", "write a page, too, with all curves in one chart")

    command("watch", run_watch, "Draw a run's curves in the terminal while it trains.", run_directory="RUN")
    command("plot", run_plot, "Draw a run's curves into its curves.png.", run_directory="RUN")
    command("recipes", run_recipes, "List the recipes of train --recipe, and what was measured with them.")
    command("models", run_models, "List the models that can be created by name.")
    info = command("info", run_info, "Show what this machine offers and which settings leave speed behind.")

    option([ev, predict, report], "--device", "NAME", *described("device"), default="auto")
    meaning = "fp32, tf32, bf16 or fp16"
    option([ev, predict], "--precision", "KIND", meaning, described("precision")[1], default="fp32")
    heads = "attention heads of a checkpoint that does not say how many it has"
    option([ev, predict, summary, convert, export], "--num-heads", "N", heads, whole(1))
    switch([ev, predict, summary, info], "--json", "print one JSON object")
    parser.commands = list(commands.choices)
    return parser


# --- the commands ---------------------------------------------------------------------------------------------


def run_train(args: argparse.Namespace) -> None:
    file = read_toml(args.config) if args.config else {}
    given = merge(file, {name: value for name, value in vars(args).items() if name in FIELDS})
    if "model" in given:
        known_model(given["model"])
    from tinyvit.training.run import train

    train(given, resume=args.resume, started=args.started)


def run_eval(args: argparse.Namespace) -> None:
    from tinyvit.checkpoints.loading import open_checkpoint
    from tinyvit.data import Augment
    from tinyvit.data.splits import image_names
    from tinyvit.evaluation.metrics import combined, data_for, evaluate, labels_for, write_confusion, write_predictions

    group = init()
    if args.probe and args.split not in (None, "test"):
        raise UsageError(f"--probe learns from the training split, expected --split test, got {args.split}")
    checkpoint = open_checkpoint(args.checkpoint, num_heads=args.num_heads)
    model = checkpoint.build(copy=False).to(group.device(args.device))
    data = data_for(checkpoint, args.data, args.skip_corrupt)
    if args.probe:
        from tinyvit.evaluation.probe import probe

        found = probe(args.probe, checkpoint, model, data, args.precision, group)
        setting = ", ".join(f"{name} {value:g}" for name, value in found.setting.items())
        what = f"{data.test_name} split of {data.name}, {args.probe} probe ({setting})"
        scores, about = found.scores, {"probe": args.probe, **found.setting}
    else:
        parts = chosen_parts(data, args.split)
        scaling = Augment(*checkpoint.preprocessing.statistics)
        by_part = {}
        for name, split in parts.items():
            labels = labels_for(checkpoint, split.labels, data.class_names)
            measured = evaluate(
                model, split, labels, checkpoint.class_names, scaling,
                threads=group.threads, precision=args.precision, group=group,
            )  # fmt: skip
            assert measured is not None  # nothing stops it
            by_part[name] = measured
        scores = combined(list(by_part.values()))
        accuracies = {name: {"images": s.images, "accuracy": s.accuracy} for name, s in by_part.items()}
        about = {"images": scores.images, "splits": accuracies}
        counts = [f"{s.images} {name} ({s.accuracy:.2%})" for name, s in by_part.items()]
        what = f"{data.name}, {', '.join(counts) if counts[1:] else next(iter(parts)) + ' split'}"
    if not group.leads:
        return
    if args.confusion:
        write_confusion(Path(args.confusion), scores)
    if args.predictions:
        named = {"test": data.test} if args.probe else parts
        images = [image for name, split in named.items() for image in image_names(name, split)]
        write_predictions(Path(args.predictions), scores, images)
    print_json({**about, **scores_dict(scores)}) if args.json else print_scores(scores, what)


def chosen_parts(data: Data, name: str | None) -> dict[str, Split]:
    """The split of that name, or all of them for "all" and None. Raises UsageError."""
    if name in (None, "all"):
        return data.parts
    if name not in data.parts:
        raise UsageError(f"{data.name} has no {name} images, expected --split {', '.join(data.parts)} or all")
    return {name: data.parts[name]}


def run_predict(args: argparse.Namespace) -> None:
    from tinyvit.backend.devices import pick_device
    from tinyvit.checkpoints.loading import open_checkpoint
    from tinyvit.checkpoints.readers.safetensors import mapped
    from tinyvit.evaluation.classify import image_paths, likeliest, run_on_images
    from tinyvit.evaluation.export import check_features_path, overlay_paths, write_features, write_overlays
    from tinyvit.evaluation.metrics import check_head
    from tinyvit.evaluation.zero_shot import read_labels

    with mapped():
        checkpoint = open_checkpoint(args.checkpoint, num_heads=args.num_heads)
    images = image_paths(args.images)
    overlays = overlay_paths(Path(args.attention), images) if args.attention else []
    if args.embed:
        check_features_path(Path(args.embed), Path(args.checkpoint))
    labels = read_labels(Path(args.labels), checkpoint.similarity) if args.labels else None
    if not (args.attention or args.embed or labels):
        check_head(checkpoint)
    model = checkpoint.build(copy=False).to(pick_device(args.device))
    outputs = run_on_images(model, images, args.precision)
    if args.embed:
        write_features(Path(args.embed), outputs, images, checkpoint, args.checkpoint)
    write_overlays(overlays, images[: len(overlays)], checkpoint, model)

    names = labels.names if labels else checkpoint.class_names
    probabilities = labels.probabilities(outputs) if labels else outputs.probabilities
    predictions = []
    for i, (path, p) in enumerate(zip(images, probabilities, strict=True)):
        named = likeliest(names, p, args.top)
        classes = [{"name": name, "probability": probability} for name, probability in named]
        overlay = {"attention": str(overlays[i])} if overlays else {}
        predictions.append({"image": path, "classes": classes, **overlay})
    print_json({"predictions": predictions}) if args.json else print_predictions(predictions)
    if args.embed and not args.json:
        print(printable(f"features in {args.embed}"))


def run_summary(args: argparse.Namespace) -> None:
    from tinyvit.checkpoints.loading import open_checkpoint
    from tinyvit.models.registry import model_config
    from tinyvit.models.summary import summarise

    if Path(args.model).exists() or args.model.startswith("hf:"):
        config = open_checkpoint(args.model, num_heads=args.num_heads).config
    else:
        heads = {} if args.num_heads is None else {"num_heads": args.num_heads}
        config = model_config(known_model(args.model), **heads)
    size = None if args.image_size is None else height_and_width(args.image_size)
    summary = summarise(config, image_size=size)
    print_json(summary.as_dict()) if args.json else print(summary.as_table())


def run_convert(args: argparse.Namespace) -> None:
    from tinyvit.checkpoints.convert import convert

    convert(Path(args.checkpoint), Path(args.path), args.to, num_heads=args.num_heads)
    print(printable(f"{args.path}: {args.checkpoint} in the layout of {args.to}"))


def run_export(args: argparse.Namespace) -> None:
    from tinyvit.checkpoints.loading import open_checkpoint
    from tinyvit.checkpoints.onnx_file import write_onnx

    checkpoint = open_checkpoint(args.checkpoint, num_heads=args.num_heads)
    path, inside = Path(args.path), {"preprocess": args.preprocess, "softmax": args.softmax}
    write_onnx(checkpoint, path, **inside, precision=args.precision)
    print(printable(f"{args.path}: {args.checkpoint} as an ONNX graph"))


def run_plot(args: argparse.Namespace) -> None:
    from tinyvit.training.run_directory import plot

    print(printable(f"curves in {plot(Path(args.run_directory))}"))


def run_report(args: argparse.Namespace) -> None:
    from tinyvit.backend.devices import pick_device
    from tinyvit.viz.report import write_report

    page = write_report(args.checkpoint, args.data, args.out, pick_device(args.device))
    print(printable(f"report in {page}"))


def run_compare(args: argparse.Namespace) -> None:
    from tinyvit.viz.compare import read_runs, rows, write_comparison

    runs = read_runs(args.runs)
    columns = rows(runs)
    headings = list(next(iter(columns.values())))
    print_table([("", *columns), *((name, *(column[name] for column in columns.values())) for name in headings)])
    if args.out:
        write_comparison(runs, Path(args.out))
        print(printable(f"comparison in {args.out}"))


def run_watch(args: argparse.Namespace) -> None:
    from tinyvit.viz.watch import watch

    watch(Path(args.run_directory))


def run_models(args: argparse.Namespace) -> None:
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


def run_recipes(args: argparse.Namespace) -> None:
    from tinyvit.training.recipes import FILES, read_recipe

    rows: list[tuple[str, ...]] = [("name", "data", "model", "length", "device", "accuracy")]
    for name in FILES:
        recipe = read_recipe(name)
        o = recipe.options
        length = f"{o['minutes']:g} minutes" if "minutes" in o else f"{o['epochs']} epochs"
        rows.append((name, o.get("data", "any"), o.get("model", "any"), length, recipe.device, recipe.accuracy))
    print_table(rows)


def run_info(args: argparse.Namespace) -> None:
    from tinyvit.execution import system_info

    found = system_info.collect()
    print_json(found.to_dict()) if args.json else print(system_info.as_table(found))


def known_model(name: str) -> str:
    """`name`, which must be a model's. Raises UsageError."""
    from tinyvit.models.registry import list_models

    if name not in list_models():
        raise UsageError(f"there is no model {name!r}{nearest(name, list_models())}; `tinyvit models` lists them")
    return name


# --- printing -------------------------------------------------------------------------------------------------


def print_json(value: dict[str, Any]) -> None:
    """Print JSON; what the encoding of standard output lacks is written as JSON's own escapes."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    print(text)


def escape_output() -> None:
    """Let standard output and error escape what their encoding lacks, instead of ending the command with an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns that line up: the first to the left, the others to the right."""
    print("\n".join(aligned([[printable(cell) for cell in row] for row in rows])))


def print_predictions(predictions: Sequence[dict[str, Any]]) -> None:
    names = [printable(c["name"]) for prediction in predictions for c in prediction["classes"]]
    width = max(map(len, names), default=0)
    for prediction in predictions:
        print(printable(prediction["image"]))
        for c in prediction["classes"]:
            print(f"  {printable(c['name']):{width}}  {c['probability']:7.2%}")
        if "attention" in prediction:
            print(printable(f"  attention in {prediction['attention']}"))


def scores_dict(scores: Scores) -> dict[str, Any]:
    per_class = {name: accuracy for name, accuracy, _ in scores.per_class}
    return {"accuracy": scores.accuracy, "top5": scores.top5, "loss": scores.loss, "per_class": per_class}


def print_scores(scores: Scores, what: str) -> None:
    print(printable(f"{what}: {scores.images} images"))
    loss = "" if scores.loss is None else f"   loss {scores.loss:.4f}"
    print(f"accuracy {scores.accuracy:.2%}   top-5 {scores.top5:.2%}{loss}\n")
    rows = [("class", "accuracy", "images")]
    rows += [(name, "-" if a is None else f"{a:.2%}", str(n)) for name, a, n in scores.per_class]
    print_table(rows)


# --- the way in and out ---------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 for failed work, 2 for bad usage, 130 or 143 after a signal."""
    started = time.monotonic()
    escape_output()
    warnings.formatwarning = lambda message, *_: f"tinyvit: warning: {printable(str(message))}\n"
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # what is not finite is an error of ours, in one line
    try:
        argv = sys.argv[1:] if argv is None else list(argv)
        group = init() if argv[:1] in (["train"], ["eval"]) else ALONE  # others work on their own
        if not group.leads:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        with group.together():
            args = parse(argv)
            args.started = started
            args.run(args)
        sys.stdout.flush()
        return 0
    except UsageError as error:
        return fail(error, 2)
    except KeyboardInterrupt:
        print("tinyvit: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output went away; Python's own flush at exit must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError as error:
        return fail(f"out of memory{f' ({error})' if str(error) else ''}: a smaller model or batch may fit", 1)
    except Exception as error:
        return fail_known(error)


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments. Raises UsageError; --help and --version end the process."""
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if args.command is None:
        *others, last = parser.commands
        given = f", got {rest[0]}" if rest else ""
        raise UsageError(f"expected a command: {', '.join(others)} or {last}{given}")
    if rest:
        options = args.parser.format_usage().replace("[", " ").split() if rest[0].startswith("-") else ()
        raise UsageError(f"{args.command} does not know {rest[0]}{nearest(rest[0], options)}")
    return args


def fail_known(error: Exception) -> int:
    """Report an error that is expected to happen; raise the others, which are bugs."""
    from tinyvit.backend.devices import DeviceError
    from tinyvit.checkpoints.checkpoint import CheckpointError
    from tinyvit.data import DataError
    from tinyvit.evaluation.metrics import EvaluationError
    from tinyvit.training.trainer import Stopped, TrainError

    if isinstance(error, Failed) or (isinstance(error, Stopped) and not init().leads):
        return 0  # another process says why, and launchers combine what all return
    if isinstance(error, Stopped):
        program = "python -m tinyvit" if sys.argv[0].endswith("__main__.py") else "tinyvit"
        print(printable(f"stopped; to go on: {program} train --out {shlex.quote(str(error.out))} --resume"), flush=True)
        return 128 + error.signum
    if isinstance(error, OSError) and error.filename is not None:
        return fail(f"{error.filename}: {error.strerror}", 1)
    expected = CheckpointError | DataError | DeviceError | EvaluationError | TrainError | OSError | ValueError
    if isinstance(error, expected | DistributedError):
        return fail(error, 1)
    raise error


def fail(problem: object, status: int) -> int:
    print(f"tinyvit: error: {printable(' '.join(str(problem).split()))}", file=sys.stderr)
    return status
