"""Image folders: `train/CLASS/*` with `test/CLASS/*` (or val), or just `CLASS/*`, split here."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from tinyvit.data.base import DataError
from tinyvit.data.image import is_image
from tinyvit.data.sources.listing import one_of_each, part_of
from tinyvit.data.stored import Rows, Texts


def find_in_folder(root: Path) -> tuple[dict[str, Rows], Sequence[str]]:
    """The images of an image folder by part, and its classes; see tinyvit.data.load_data. Raises DataError."""
    roots = find_parts(root)
    classes = class_folders(roots["train"])
    if len(classes) < 2:
        found = f"only {classes[0].name}" if classes else "none"
        raise DataError(f"{roots['train']} must hold at least two class folders with images, found {found}")
    names = tuple(folder.name for folder in classes)
    parts = {}
    for part, folder in roots.items():
        if strangers := [f for f in class_folders(folder) if f.name not in names]:
            raise DataError(
                f"{strangers[0]} is a class that {roots['train']} does not have (it has {', '.join(names)[:200]})"
            )
        parts[part] = list_images(folder, names)
        if not parts[part].files:
            raise DataError(f"the class folders of {folder} have no images that can be recognised")
    with_images = set(parts["train"].classes)
    if missing := [folder for folder in classes if folder.name not in with_images]:
        raise DataError(f"class folder {missing[0]} has no images that can be recognised")
    return parts, names


def find_parts(root: Path) -> dict[str, Path]:
    """The folders of the training, validation and test classes; `root` itself trains if it has no such folders.

    Raises:
        DataError: a folder could be a part of the data set or a class.
    """
    folders = class_folders(root)
    with_classes = [folder for folder in folders if class_folders(folder)]
    found = one_of_each(root, (folder.name for folder in with_classes))
    if not found:
        named = one_of_each(root, (folder.name for folder in folders))
        # A folder called train that holds no folders is a class if there are others beside it.
        alone = "train" in named and len(named) == len(folders)
        return {"train": root / named["train"] if alone else root}
    if "train" not in found:
        if len(with_classes) == len(found) and all(part_of(folder.name) for folder in folders):
            raise DataError(f"{root} has {next(iter(found.values()))}/ but no train/")
        return {"train": root}
    for folder in folders:
        if folder.name not in found.values() and part_of(folder.name) is None and any(images_below(root, folder.name)):
            raise DataError(
                f"{root} has {found['train']}/ and also images in {folder.name}/, which is no part of a data set: "
                f"move it away, or give {root / found['train']}"
            )
    return {part: root / name for part, name in found.items()}


def class_folders(folder: Path) -> list[Path]:
    """Visible folders in `folder` by name, without what archives and Python leave there, and links back up to it."""
    here = folder.resolve()
    return sorted(
        child
        for child in folder.iterdir()
        if not child.name.startswith(".")
        and child.name not in ("__MACOSX", "__pycache__")
        and child.is_dir()
        and not here.is_relative_to(child.resolve())
    )


def list_images(root: Path, names: tuple[str, ...]) -> Rows:
    """The images in and below each class folder, by name.

    Raises DataError for a link to a folder below them, unless it leads back up.
    """
    files, classes = Texts(), list[str]()
    visible = (path for path in root.iterdir() if not path.name.startswith(".") and path.is_file())
    others = [str(path) for path in visible if is_image(path)]
    for name in names:
        for file in sorted(files_below(root, name)):
            if is_image(os.path.join(root, file)):
                files.append(file)
                classes.append(name)
            elif (root / file).is_dir():  # a link
                if not root.resolve().is_relative_to((root / file).resolve()):
                    raise DataError(f"{root / file} is a link to a folder, which is not followed: copy its images")
            else:
                others.append(str(root / file))
    return Rows(root, files, classes, no_images=tuple(sorted(others)))


def images_in(folder: Path) -> tuple[list[str], list[str]]:
    """All images in and below a folder, by name, and its other files."""
    images, others = list[str](), list[str]()
    for file in sorted(folder / file for file in files_below(folder, "")):
        (images if is_image(file) else others).append(str(file))
    return images, others


def files_below(root: Path, name: str) -> Iterator[str]:
    """The visible files, and links to folders, in and below the folder `name` of `root`, in no order.

    They are relative to `root`. Raises OSError.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # a part may lack a class
            raise error

    for folder, folders, members in os.walk(root / name, onerror=refuse):
        folders[:] = [child for child in folders if not child.startswith(".")]
        inside = Path(folder).relative_to(root).as_posix()
        prefix = "" if inside == "." else f"{inside}/"
        members += [child for child in folders if os.path.islink(os.path.join(folder, child))]
        yield from (prefix + m for m in members if not m.startswith((".", "Thumbs.db", "desktop.ini")))


def images_below(root: Path, name: str) -> Iterator[str]:
    """Those of `files_below` that are images."""
    return (file for file in files_below(root, name) if is_image(root / file))


def first_image(root: Path) -> str | None:
    """An image in or below the folders of `root`, relative to it, if there is one."""
    return next((file for folder in class_folders(root) for file in images_below(root, folder.name)), None)
