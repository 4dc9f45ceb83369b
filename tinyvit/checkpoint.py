"""Saving and loading weights, whole or not at all, and never through pickle.

A checkpoint of ours is one safetensors file: the weights under their state-dict names, and in its metadata one
JSON object (key "tinyvit") with everything else that is needed to use them: the model's config, the class names,
the size, mean and std of its pictures. A training checkpoint (`last.safetensors`) also carries tensors named
`optimizer.…` and `ema.…`, and its position in the run under "progress". Other libraries' files are for `formats`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyvit.preprocessing import Preprocessing

if TYPE_CHECKING:
    from tinyvit.vit import VisionTransformer, ViTConfig

BEST, LAST = "best.safetensors", "last.safetensors"
TRAINING_PREFIXES = ("optimizer.", "ema.", "step.")


class CheckpointError(Exception):
    """A checkpoint that cannot be read or does not fit; the message is one line."""


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path beside `path` to write to; it takes the place of `path` only once it is whole and on disk.

    When the block raises, `path` is as it was before and nothing is left beside it. A process killed inside the
    block leaves the hidden file `.NAME.tmp`, which the next write of the same file replaces.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        yield beside
        with open(beside, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(beside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        unnamed = isinstance(error, OSError) and error.filename in (None, str(beside))  # a full disk, or no such place
        if unnamed and error.errno is not None:
            raise OSError(error.errno, f"could not write: {error.strerror}", str(path)) from None
        raise
    if os.name == "posix":  # the new name is on disk only when its directory is
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file whole or not at all."""
    with atomic_write(path) as beside:
        beside.write_text(text, encoding="utf-8")


def save(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Write `tensors` and `metadata` (anything that JSON can say) as one safetensors file, whole or not at all.

    Raises OSError when the file cannot be written (a full disk, a missing directory).
    """
    from safetensors.numpy import save as serialise

    contiguous = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in tensors.items()}
    content = serialise(contiguous, metadata={"tinyvit": json.dumps(metadata)})
    with atomic_write(path) as beside:  # not save_file, which leaves files of its own beside when it is killed
        beside.write_bytes(content)


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise CheckpointError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError, TypeError, AttributeError) as error:  # the last two: a dtype that NumPy lacks
        raise CheckpointError(f"{path}: not a readable safetensors file ({_one_line(error)})") from None


def _metadata(path: str | os.PathLike[str], file: Any) -> dict[str, Any]:
    try:
        metadata = json.loads(file.metadata()["tinyvit"])
    except (KeyError, TypeError):
        raise CheckpointError(f"{path}: not a checkpoint of tinyvit (its metadata describes no model)") from None
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: its metadata is damaged")
    return metadata


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata that `save` wrote, without the tensors. Raises CheckpointError."""
    with _opened(path) as file:
        return _metadata(path, file)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and metadata that `save` wrote. Raises CheckpointError."""
    from .formats.safetensors_file import read_safetensors

    metadata = read_metadata(path)
    return read_safetensors(Path(path)), metadata


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Weights and what is needed to use them on a picture.

    `split` says how the training run divided a folder without a test part (`val_fraction`, `seed`), so that an
    evaluation divides it alike. `names_known` is false where nothing said what the classes are, and `class_names` only
    number them.
    """

    path: Path
    config: ViTConfig
    state: dict[str, np.ndarray]
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    split: dict[str, Any] = dataclasses.field(default_factory=dict)
    names_known: bool = True

    @property
    def mean(self) -> tuple[float, ...]:
        """One float per channel in 0..1 units."""
        return self.preprocessing.mean

    @property
    def std(self) -> tuple[float, ...]:
        """One float per channel in 0..1 units."""
        return self.preprocessing.std

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the model's pictures."""
        return self.config.image_size  # type: ignore[return-value]  # the config keeps pairs

    def build(self, *, interpolation: str = "bicubic", copy: bool = True, **overrides: Any) -> VisionTransformer:
        """The model with its weights, in eval mode; `overrides` replace fields of its config.

        Another `image_size` or `patch_size` resizes the position embeddings (`interpolation` as in `adapt`) and the
        patch kernels. Another `num_classes` gives a head of zeros; 0 leaves it out. With `copy=False` the model keeps
        the arrays of `state`. Raises CheckpointError when weights are missing, left over, of another shape or not
        finite, TypeError or ValueError for overrides that make no model.
        """
        from tinyvit.adapt import adapt
        from tinyvit.nn import no_init
        from tinyvit.vit import VisionTransformer

        config = self.config.replace(**overrides)
        for name, array in self.state.items():
            if not np.all(np.isfinite(array)):
                raise CheckpointError(f"{self.path}: {name} holds values that are not finite")
        state = adapt(self.state, self.config, config, interpolation)
        with no_init():
            model = VisionTransformer(config)
        try:
            model.load_state_dict(state, copy=copy)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from None
        model.class_names = self.class_names if config.num_classes == self.config.num_classes else ()
        model.preprocessing = self.preprocessing
        return model.eval()


def describe(
    config: ViTConfig,
    class_names: tuple[str, ...],
    preprocessing: Preprocessing,
    split: Mapping[str, Any],
    names_known: bool = True,
) -> dict[str, Any]:
    """The metadata from which a Checkpoint is read back."""
    return {
        "config": config.to_dict(),
        "class_names": list(class_names),
        "names_known": names_known,
        **preprocessing.to_dict(),
        "split": dict(split),
    }


def load_run(path: Path) -> Checkpoint:
    """A run directory (best weights, else the last ones) or one of its safetensors files."""
    from tinyvit.vit import ViTConfig

    if path.is_dir():
        path = path / BEST if (path / BEST).is_file() else path / LAST
    tensors, metadata = read(path)
    try:
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in metadata["config"].items()}
        config = ViTConfig(**fields)
        names = tuple(metadata["class_names"])
        if config.num_classes and len(names) != config.num_classes:
            raise ValueError(f"{len(names)} names for {config.num_classes} classes")
        return Checkpoint(
            path=path,
            config=config,
            state={name: array for name, array in tensors.items() if not name.startswith(TRAINING_PREFIXES)},
            class_names=names,
            preprocessing=Preprocessing.from_dict(metadata),
            split={key: metadata["split"][key] for key in ("val_fraction", "seed") if key in metadata["split"]},
            names_known=bool(metadata.get("names_known", True)),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: its metadata describes no model ({_one_line(error)})") from None


def is_run(path: Path) -> bool:
    """Whether `path` is a run directory with weights, or a safetensors file with our metadata."""
    if path.is_dir():
        return (path / BEST).is_file() or (path / LAST).is_file()
    with contextlib.suppress(CheckpointError), _opened(path) as file:
        return "tinyvit" in (file.metadata() or {})
    return False


def open_checkpoint(path: str | os.PathLike[str], **hints: Any) -> Checkpoint:
    """Read the weights, the config and the preprocessing at `path`. Raises CheckpointError.

    `hints` are fields of the config that help where the files do not tell (num_heads); a guess is warned of.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such run or checkpoint")
    if is_run(path):
        return load_run(path)
    from tinyvit.formats import open_foreign

    return open_foreign(path, hints)


def load_model(path: str | os.PathLike[str], *, interpolation: str = "bicubic", **overrides: Any) -> VisionTransformer:
    """The model saved at `path`, in eval mode: a run directory (its best weights) or a checkpoint.

    Checkpoints are files of ours, Hugging Face directories of ViT and DeiT, timm's .safetensors, .pth and hub
    directories, and Google's .npz; what it is shows in its content. `model.class_names` and `model.preprocessing` tell
    what its outputs and inputs are.

    Args:
        path: a file or a directory.
        interpolation: how position embeddings are resized: "bicubic", or "bilinear" as in the original JAX code.
        overrides: replace fields of the config: `drop_path=0.1`; `num_classes=0` for the feature before the head,
            another number for a new head of zeros; `image_size=384` or `patch_size=8` resizes what depends on it.

    Raises:
        CheckpointError: one line long, for what cannot be read or does not fit.
        TypeError, ValueError: overrides that make no model.
    """
    return open_checkpoint(path, **overrides).build(interpolation=interpolation, copy=False, **overrides)


def _one_line(error: BaseException) -> str:
    """An error's message on one line (str of a KeyError would quote it)."""
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(message.split())
