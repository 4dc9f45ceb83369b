"""The command line: which commands there are and what they take, errors of one line, exit statuses."""

from __future__ import annotations

import argparse
import io
import os
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tinyvit import commands
from tinyvit._version import __version__
from tinyvit.distributed import ALONE, Failed, init
from tinyvit.errors import ReportedError, Stopped
from tinyvit.execution.precision import PREDICTION_PRECISIONS
from tinyvit.files.text import nearest, printable
from tinyvit.training.config import FIELDS, UsageError, flag, image_size, one_of, whole


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, exit status 2 and no usage text."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(re.sub(r"^argument (\S+): ", r"\1: ", message))

    def take(self, name: str, parse: Callable[[str], Any], meaning: str, metavar: str = "", **more: Any) -> None:
        """Add an operand, or an option with a value."""
        metavar = metavar or parse.metavar  # type: ignore[attr-defined]
        default = f" (default: {more['default']})" if "default" in more else ""
        self.add_argument(name, type=parse, help=meaning + default or None, metavar=metavar, **more)

    def take_as_train(self, name: str, **more: Any) -> None:
        """Add an option of `train`."""
        about = FIELDS[name].metadata
        self.take(flag(name), about["parse"], about["help"], about["metavar"], **more)

    def switch(self, name: str, meaning: str) -> None:
        """Add an option without a value."""
        self.add_argument(name, action="store_true", help=meaning)


def make_parser() -> tuple[Parser, Sequence[str]]:
    """The parser, and the names of its commands."""
    parser = Parser(prog="tinyvit", description="Vision Transformers on NumPy and CuPy.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"tinyvit {__version__}")
    subs = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)

    def command(name: str, run: Callable[[argparse.Namespace], None], meaning: str, checkpoint: str = "") -> Parser:
        sub = subs.add_parser(name, help=meaning, description=meaning, allow_abbrev=False)
        sub.set_defaults(run=run, parser=sub)
        if checkpoint:
            sub.add_argument("checkpoint", metavar=checkpoint)
        return sub

    train = command("train", commands.train, "Train a model on a data set, into a run directory.")
    length = train.add_mutually_exclusive_group()
    for name, field in FIELDS.items():
        about, target = field.metadata, length if name in ("epochs", "minutes") else train
        given = "" if field.default is None or about["parse"] is bool else f" (default: {field.default})"
        kind: dict[str, Any] = {"type": about["parse"], "metavar": about["metavar"]}
        if about["parse"] is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        target.add_argument(flag(name), default=argparse.SUPPRESS, help=about["help"] + given, **kind)
    train.switch("--resume", "go on with the run in --out where it stopped")
    train.take("--config", str, "options from a file; those given here count more", "FILE.toml")

    ev = command("eval", commands.eval_, "Measure a model's accuracy on a data set.", "RUN|CKPT")
    ev.take_as_train("data", required=True)
    ev.take("--split", one_of("train", "val", "test", "all"), "a part of SRC (default: all)")
    ev.take("--probe", one_of("knn", "linear"), "measure features instead, on the training split, for any classes")
    ev.take("--confusion", Path, "write how often each class was taken for each", "FILE.csv")
    ev.take("--predictions", Path, "write the true and predicted class of each image", "FILE.csv")

    predict = command("predict", commands.predict, "Name what images show.", "RUN|CKPT")
    predict.take("images", str, "files, or directories of images", "IMAGE", nargs="+")
    predict.take("--top", whole(1), "how many classes", "K", default=5)
    texts = "classes by the text embeddings of their names, for CLIP and SigLIP models"
    predict.take("--labels", Path, texts, "FILE.npz")
    predict.take("--attention", Path, "draw into DIR each image beside where in it the model looks", "DIR")
    predict.take("--embed", Path, "write the features before the head, to search by likeness", "FILE.npz")

    layers = "List a model's layers, parameters, FLOPs and memory."
    summary = command("summary", commands.summary, layers, "NAME|RUN|CKPT")
    summary.take("--image-size", image_size, "for images of another size")

    layout = "Write a checkpoint in the layout of another library, or in ours."
    convert = command("convert", commands.convert, layout, "RUN|CKPT")
    convert.take("path", Path, "a new directory; for tinyvit and timm also a .safetensors file", "DST")
    convert.take("--to", one_of("tinyvit", "timm", "huggingface"), "the layout", required=True)

    onnx = "Write an ONNX file, which other runtimes execute (extra: onnx)."
    export = command("export", commands.export, onnx, "RUN|CKPT")
    export.take("path", Path, "", "FILE.onnx")
    export.switch("--preprocess", "take pixels from 0 to 255 and normalise them inside")
    export.switch("--softmax", "give probabilities in the place of logits")
    export.take("--precision", one_of("fp32", "fp16"), "of the weights and the arithmetic", default="fp32")

    page = "Write one HTML page with all that is known about a run or a checkpoint."
    report = command("report", commands.report, page, "RUN|CKPT")
    report.take("--data", str, "whose test images are measured (default: the run's data)", "SRC")
    report.take("--out", Path, "the page (default: report.html in the run)", "FILE.html")

    compare = command("compare", commands.compare, "Show in which settings runs differ, and how well each did.")
    compare.take("runs", str, "", "RUN", nargs="+")
    compare.take("--out", Path, "write a page, too, with all curves in one chart", "FILE.html")

    watch = command("watch", commands.watch, "Draw a run's curves in the terminal while it trains.")
    plot = command("plot", commands.plot, "Draw a run's curves into its curves.png.")
    command("recipes", commands.recipes, "List the recipes of train --recipe, and what was measured with them.")
    command("models", commands.models, "List the models that can be created by name.")
    info = command("info", commands.info, "Show what this machine offers and which settings leave speed behind.")

    for sub in (watch, plot):
        sub.take("run_directory", Path, "", "RUN")
    for sub in (ev, predict, report):
        sub.take_as_train("device", default="auto")
        sub.switch("--skip-corrupt", FIELDS["skip_corrupt"].metadata["help"])
    for sub in (ev, predict):
        sub.take(
            "--precision",
            one_of(*PREDICTION_PRECISIONS),
            "of the arithmetic; tf32 on a GPU alone, int8 on a CPU alone, where fp16 is slow",
            default="fp32",
        )
    for sub in (ev, predict, summary, convert, export):
        sub.take("--num-heads", whole(1), "attention heads of a checkpoint that does not say how many it has")
    for sub in (ev, predict, summary, info):
        sub.switch("--json", "print one JSON object")
    return parser, list(subs.choices)


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments. Raises UsageError; --help and --version end the process."""
    parser, names = make_parser()
    expected = f"expected a command: {', '.join(names[:-1])} or {names[-1]}"
    command = next((word for word in argv if not word.startswith("-")), None)
    if command is not None and command not in names:
        raise UsageError(f"{expected}, got {command!r}{nearest(command, names)}")
    args, rest = parser.parse_known_args(argv)
    if args.command is None:
        raise UsageError(expected + (f", got {rest[0]}" if rest else ""))
    if rest:
        options = re.findall(r"--[\w-]+", args.parser.format_usage()) if rest[0].startswith("-") else ()
        raise UsageError(f"{args.command} does not know {rest[0]}{nearest(rest[0], options)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 for failed work, 2 for bad usage, 130 or 143 after a signal."""
    started = time.monotonic()
    for stream in (sys.stdout, sys.stderr):  # what their encoding lacks is escaped, and ends no command
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
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
    except Failed:
        return 0  # another process says why, and launchers combine what all return
    except Stopped as stopped:
        program = "python -m tinyvit" if sys.argv[0].endswith("__main__.py") else "tinyvit"
        resume = f"{program} train --out {shlex.quote(str(stopped.out))} --resume"
        print(printable(f"stopped; to go on: {resume}"), flush=True)
        return 128 + stopped.signum if init().leads else 0
    except OSError as error:
        return fail(error if error.filename is None else f"{error.filename}: {error.strerror}", 1)
    except (ReportedError, ValueError) as error:  # others are bugs
        return fail(error, 1)


def fail(problem: object, status: int) -> int:
    print(f"tinyvit: error: {printable(' '.join(str(problem).split()))}", file=sys.stderr)
    return status
