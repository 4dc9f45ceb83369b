"""Image folders: both layouts, what counts as an image, broken files, sizes, and memory."""

import os
import re
import shutil

import numpy as np
import pytest
from pictures import colours, grow, paint
from PIL import Image
from running import count_decoded

from tinyvit.data import DataError, load_data
from tinyvit.data.sources import listing
from tinyvit.data.splits import ArraySplit, FileSplit


def tree(root, test="test", **options):
    grow(root / "train", count=5, **options)
    grow(root / test, count=2, **options)
    return root


# --- layouts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("test", ["test", "val", "validation", "valid", "Val"])
def test_train_and_test(tmp_path, test):
    data = load_data(tree(tmp_path / "pets", test))
    assert (data.name, data.class_names, data.image_size, data.in_chans) == ("pets", ("cat", "dog"), (8, 8), 3)
    assert data.train.labels.tolist() == [0] * 5 + [1] * 5 and data.train.labels.dtype == np.int64
    assert colours(data.train) == [[k, i] for k in range(2) for i in range(5)]
    assert colours(data.test) == [[k, i] for k in range(2) for i in range(2)] and data.test.labels.tolist() == [
        0,
        0,
        1,
        1,
    ]
    np.testing.assert_allclose(data.mean, [0.5 / 255, 2 / 255, 100 / 255], rtol=1e-12)
    np.testing.assert_allclose(data.std, [0.5 / 255, np.sqrt(2) / 255, 1], rtol=1e-12)  # the third never varies


def test_test_is_preferred_to_val(tmp_path):
    tree(tmp_path, "val")
    grow(tmp_path / "test", count=1)
    assert len(load_data(tmp_path).test) == 2


def test_unlabelled_test_gives_way_to_val(tmp_path):
    """As in ImageNet, whose test images lie in no class folders."""
    tree(tmp_path, "val")
    paint(tmp_path / "test" / "1.png")
    assert len(load_data(tmp_path).test) == 4


@pytest.mark.parametrize("inside", ["", "train"])
def test_classes_alone_are_split(tmp_path, inside):
    grow(tmp_path / inside, ("a", "b", "c"), count=10)
    data = load_data(tmp_path, val_fraction=0.3, seed=5)
    assert np.bincount(data.train.labels).tolist() == [7] * 3 and np.bincount(data.test.labels).tolist() == [3] * 3
    train, test = colours(data.train), colours(data.test)
    assert sorted(train + test) == [[k, i] for k in range(3) for i in range(10)]
    assert [k for k, _ in train] == data.train.labels.tolist() and [k for k, _ in test] == data.test.labels.tolist()
    again, other = load_data(tmp_path, val_fraction=0.3, seed=5), load_data(tmp_path, val_fraction=0.3, seed=6)
    assert colours(again.test) == test != colours(other.test)
    assert again.fingerprint == data.fingerprint != other.fingerprint


def test_another_image_under_the_same_name_is_another_data_set(tmp_path):
    grow(tmp_path, ("a", "b"), count=4)
    before = load_data(tmp_path, image_size=16).fingerprint
    assert load_data(tmp_path, image_size=16).fingerprint == before
    image = next((tmp_path / "a").iterdir())
    Image.effect_noise((40, 40), 90).convert("RGB").save(image)
    assert load_data(tmp_path, image_size=16).fingerprint != before


def test_every_class_keeps_and_gives_an_image(tmp_path):
    grow(tmp_path, count=2)
    for fraction in (0.01, 0.99):
        data = load_data(tmp_path, val_fraction=fraction)
        assert data.train.labels.tolist() == data.test.labels.tolist() == [0, 1]


def test_cifar_layout_beside_train_is_left_alone(tmp_path):
    tree(tmp_path)
    (tmp_path / "cifar-10-batches-bin").mkdir()
    (tmp_path / "cifar-10-batches-bin" / "data_batch_1.bin").write_bytes(b"")
    assert load_data(tmp_path).class_names == ("cat", "dog")


def test_fingerprint_moves_with_the_folder_and_knows_its_files(tmp_path):
    before = load_data(tree(tmp_path / "a")).fingerprint
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert load_data(tmp_path / "b").fingerprint == before
    paint(tmp_path / "b" / "train" / "cat" / "more.png")
    assert load_data(tmp_path / "b").fingerprint != before


# --- what counts --------------------------------------------------------------------------------------------


def test_other_files_and_hidden_ones_are_passed_over(tmp_path):
    root = tree(tmp_path)
    for name in ("notes.txt", ".hidden.png", "Thumbs.db"):
        (root / "train" / "cat" / name).write_text("no image")
    for name in (".git", ".ipynb_checkpoints", "__MACOSX"):
        paint(root / "train" / name / "x.png")
    (root / "train" / "cat" / ".cache").mkdir()
    (root / "train" / "cat" / ".cache" / "x.png").write_text("no image")
    (root / "train" / "readme.md").write_text("")
    data = load_data(root)
    assert data.class_names == ("cat", "dog") and len(data.train) == 10


def test_endings_in_any_case_and_folders_below(tmp_path):
    tree(tmp_path)
    for name in ("A.PNG", "b.Jpg", "c.JPEG", "deep/er/d.bmp", "e.webp", "f.TIFF", "g.gif"):
        paint(tmp_path / "train" / "cat" / name)
    assert np.bincount(load_data(tmp_path).train.labels).tolist() == [12, 5]


def test_links(tmp_path):
    """A linked class folder is read; links that would lead round in circles are not followed."""
    grow(tmp_path / "elsewhere", ("bird",))
    root = tree(tmp_path / "pets")
    os.symlink(tmp_path / "elsewhere" / "bird", root / "train" / "bird")
    os.symlink(root / "train", root / "train" / "loop")
    os.symlink(root, root / "train" / "cat" / "loop")
    os.symlink(root / "train" / "dog" / "0.png", root / "train" / "cat" / "linked.png")
    data = load_data(root)
    assert data.class_names == ("bird", "cat", "dog") and np.bincount(data.train.labels).tolist() == [3, 6, 5]


def test_a_linked_folder_within_a_class_is_refused(tmp_path):
    grow(tmp_path / "elsewhere", ("bird",))
    root = tree(tmp_path / "pets")
    os.symlink(tmp_path / "elsewhere" / "bird", root / "train" / "cat" / "more")
    with pytest.raises(DataError, match="more is a link to a folder, which is not followed: copy its images"):
        load_data(root)


def test_no_class_or_image_is_left_out_without_a_word(tmp_path):
    root = tree(tmp_path / "pets")
    grow(root / "train", ("__background__", "__MACOSX"))
    paint(root / "train" / "beside.png")
    data = load_data(root)
    assert data.class_names == ("__background__", "cat", "dog")
    assert data.no_images == (str(root / "train" / "beside.png"),)


def test_test_may_lack_a_class(tmp_path):
    shutil.rmtree(tree(tmp_path) / "test" / "cat")
    data = load_data(tmp_path)
    assert data.class_names == ("cat", "dog") and data.test.labels.tolist() == [1, 1]


# --- one-line errors ----------------------------------------------------------------------------------------


def empty(root):
    root.mkdir(parents=True)


def one_class(root):
    grow(root, ("cat",))


def empty_class(root):
    tree(root)
    (root / "train" / "emu").mkdir()


def stranger(root):
    tree(root)
    grow(root / "test", ("Cat",))


def only_test(root):
    grow(root / "test")
    grow(root / "val")


def empty_test(root):
    tree(root)
    for name in ("cat", "dog"):
        shutil.rmtree(root / "test" / name)
        (root / "test" / name).mkdir()


def two_validations(root):
    tree(root, "val")
    grow(root / "Validation")
    grow(root / "test")


def single_image(root):
    grow(root)
    grow(root, ("emu",), count=1)


def flat(root):
    paint(root / "train" / "cat.1.png")
    paint(root / "train" / "dog.1.png")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (empty, "ROOT must hold at least two class folders with images, found none"),
        (one_class, "ROOT must hold at least two class folders with images, found only cat"),
        (flat, "ROOT/train must hold at least two class folders with images, found none"),
        (empty_class, r"class folder ROOT/train/emu has no images that can be recognised"),
        (stranger, r"ROOT/test/Cat is a class that ROOT/train does not have \(it has cat, dog\)"),
        (only_test, "ROOT has test/ but no train/"),
        (empty_test, r"the class folders of ROOT/test have no images that can be recognised"),
        (two_validations, "ROOT has val images under two names, Validation and val: keep one of them"),
        (single_image, "class emu of ROOT has one image, at least two are needed to split it"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, make, message):
    root = tmp_path / "pets"
    make(root)
    with pytest.raises(DataError) as error:
        load_data(root)
    assert re.fullmatch(message.replace("ROOT", re.escape(str(root))), str(error.value))


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_val_fraction_out_of_range(tmp_path, fraction):
    with pytest.raises(DataError, match=r"val_fraction .* given, expected more than 0 and less than 1"):
        load_data(grow(tmp_path), val_fraction=fraction)


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    grow(tmp_path)
    paint(tmp_path / "cat" / "more" / "1.png")
    scan = os.scandir

    def refuse(path="."):
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"cannot read .*/cat/more: Permission denied"):
        load_data(tmp_path)


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.TGZ"])
def test_archives_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=rf"{re.escape(name)} is an archive: unpack it and give the directory"):
        load_data(tmp_path / name)


def test_no_such_source(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.png is a file, expected shapes, cifar10, a directory, or"):
        load_data(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"no data at images: expected shapes, cifar10, a directory, or .* file$"):
        load_data("images")
    for word, meant in (("shape", "shapes"), ("Shaped", "shapes"), ("cifar-10", "cifar10")):
        with pytest.raises(DataError, match=f"no data at {word}: .*; did you mean {meant}"):
            load_data(word)


# --- images that cannot be read ---------------------------------------------------------------------------


def spoil(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"not an image")
    return [str(root / name) for name in names]


SIZES = [pytest.param(None, id="in memory"), pytest.param(80, id="from files")]


@pytest.mark.parametrize("image_size", SIZES)
@pytest.mark.parametrize("where", ["train/cat/2b.png", "test/dog/x.jpg"])
def test_corrupt_image_is_named(tmp_path, image_size, where):
    (bad,) = spoil(tree(tmp_path), where)
    with pytest.raises(DataError) as error:
        load_data(tmp_path, image_size=image_size)
    assert str(error.value) == (
        f"cannot read image {bad}: not an image that Pillow knows (--skip-corrupt leaves such images out)"
    )


@pytest.mark.parametrize("image_size", SIZES)
def test_corrupt_images_can_be_skipped(tmp_path, image_size):
    whole = load_data(tree(tmp_path), image_size=image_size)
    bad = spoil(tmp_path, "train/cat/2b.png", "train/dog/0b.png", "test/dog/x.jpg")
    data = load_data(tmp_path, image_size=image_size, skip_corrupt=True)
    assert (data.train.skipped, data.test.skipped) == (bad[:2], bad[2:]) and whole.train.skipped == []
    assert np.array_equal(data.train.labels, whole.train.labels) and colours(data.train) == colours(whole.train)
    assert (data.mean, data.std, data.fingerprint) == (whole.mean, whole.std, whole.fingerprint)


def test_a_class_without_readable_images(tmp_path):
    tree(tmp_path)
    spoil(tmp_path, *(f"train/emu/{i}.png" for i in range(70)))
    with pytest.raises(DataError, match=f"class emu of {re.escape(str(tmp_path))} has no readable image to train on"):
        load_data(tmp_path, skip_corrupt=True)
    spoil(tmp_path, *(f"{split}/{k}/{i}.png" for split in ("train", "test") for k in ("cat", "dog") for i in range(5)))
    with pytest.raises(DataError, match=f"none of the 80 images of {re.escape(str(tmp_path))}/train can be read"):
        load_data(tmp_path, skip_corrupt=True)
    grow(tmp_path / "alone" / "train", count=2)
    spoil(tmp_path, "alone/test/cat/0.png")
    with pytest.raises(DataError, match=f"^no image of {re.escape(str(tmp_path))}/alone/test can be read"):
        load_data(tmp_path / "alone", skip_corrupt=True)


def test_dangling_link_is_named(tmp_path):
    os.symlink(tmp_path / "gone.png", tree(tmp_path / "pets") / "train" / "cat" / "link.png")
    with pytest.raises(DataError, match=r"cannot read image .*link\.png: No such file or directory"):
        load_data(tmp_path / "pets")


def test_image_that_breaks_later(tmp_path):
    """Images read from files batch by batch: the error comes when the image is read."""
    data = load_data(tree(tmp_path), image_size=80)
    spoil(tmp_path, "train/dog/1.png")
    assert data.train.read(np.array([0, 5]), np.random.default_rng(0)).shape == (2, 3, 80, 80)
    with pytest.raises(DataError, match=r"cannot read image .*train/dog/1\.png: .* \(--skip-corrupt leaves such"):
        data.train.read(np.array([0, 6]), np.random.default_rng(0))


# --- sizes, memory, randomness ------------------------------------------------------------------------------


def test_size_is_the_images_own_if_small_and_shared(tmp_path):
    for number, (sizes, expected) in enumerate(
        [
            ([(32, 32)], (32, 32)),
            ([(48, 64)], (48, 64)),
            ([(65, 65)], (224, 224)),
            ([(32, 32), (32, 31)], (224, 224)),
        ]
    ):
        root = tmp_path / str(number)
        for size in sizes:
            for name in ("cat", "dog"):
                for i in range(2):
                    paint(root / name / f"{size[1]}-{i}.png", size=size)
        assert load_data(root).image_size == expected
        assert load_data(root, image_size=(16, 24)).train.read(np.arange(2)).shape == (2, 3, 16, 24)


def test_small_images_are_kept_in_memory(tmp_path, monkeypatch):
    data = load_data(tree(tmp_path, size=(20, 30)), image_size=16)
    expected = data.train.read(np.arange(10))
    assert isinstance(data.train, ArraySplit)
    monkeypatch.setattr(listing, "MEMORY", 10 * 3 * 16 * 16 - 1)
    larger = load_data(tmp_path, image_size=16)
    assert isinstance(larger.train, FileSplit) and isinstance(larger.test, ArraySplit)
    assert np.array_equal(larger.train.read(np.arange(10)), expected)
    assert np.array_equal(larger.train.read(np.arange(10), np.random.default_rng(0)), expected)
    assert (larger.mean, larger.std) == (data.mean, data.std)


def gradient(root):
    for name in ("cat", "dog"):
        for i in range(4):
            paint(root / name / f"{i}.png")
            rows, columns = np.mgrid[:100, :120].astype(np.uint8)
            Image.fromarray(np.stack([rows, columns, rows], axis=2)).save(root / name / f"{i}.png")
    return root


def test_large_images_are_cropped_at_random_for_training(tmp_path):
    data = load_data(gradient(tmp_path), image_size=80)
    indices = np.arange(len(data.train))
    plain = data.train.read(indices)
    first, second, other = (data.train.read(indices, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert plain.shape == first.shape == (len(indices), 3, 80, 80)
    assert np.array_equal(first, second) and not np.array_equal(first, other)
    assert len({image.tobytes() for image in first}) == len(indices)  # each image has its own crop
    assert len({image.tobytes() for image in plain}) == 1
    assert isinstance(data.test, ArraySplit)


def test_random_crops_are_resized_as_the_options_say(tmp_path):
    """With nearest neighbours no colour is mixed."""
    for name in ("cat", "dog"):
        for i in range(2):
            path = tmp_path / name / f"{i}.png"
            paint(path)
            Image.fromarray(np.random.default_rng(i).choice([0, 255], (30, 30, 3)).astype(np.uint8)).save(path)
    for interpolation, mixed in (("nearest", False), ("bicubic", True)):
        data = load_data(tmp_path, image_size=80, fit_options={"interpolation": interpolation})
        crops = data.train.read(np.arange(2), np.random.default_rng(0))
        assert (len(np.unique(crops)) > 2) == mixed


def test_transform_of_the_callers_choice(tmp_path):
    def turned(image, rng):
        return image.rotate(rng.uniform(-90, 90))

    data = load_data(gradient(tmp_path), image_size=32, image_transform=turned)
    indices = np.arange(len(data.train))
    crops = data.train.read(indices, np.random.default_rng(0))
    assert len({image.tobytes() for image in crops}) == len(indices)
    assert np.array_equal(data.train.read(indices), load_data(tmp_path, image_size=32).train.images)


def test_only_a_sample_of_a_huge_split_is_decoded_beforehand(tmp_path, monkeypatch):
    tree(tmp_path)
    whole = load_data(tmp_path, image_size=80)
    monkeypatch.setattr(listing, "SAMPLE", 5)
    spoil(tmp_path, "train/cat/1.png")  # not among positions 0, 2, 4, 6 and 9
    data = load_data(tmp_path, image_size=80)
    assert len(data.train) == len(whole.train) and data.mean != whole.mean
    np.testing.assert_allclose(data.mean, whole.mean, atol=1 / 255)
    assert len(load_data(tmp_path, image_size=80, skip_corrupt=True).train) == len(whole.train) - 1


@pytest.mark.parametrize("size", [8, 80])
def test_with_known_statistics_images_are_decoded_when_read(tmp_path, monkeypatch, size):
    whole = load_data(tree(tmp_path), image_size=size)
    opened, known = count_decoded(monkeypatch), ((0.5,) * 3, (0.25,) * 3)
    data = load_data(tmp_path, image_size=size, statistics=known)
    assert opened == [] and (data.mean, data.std) == known and data.fingerprint == whole.fingerprint
    for split, other in ((data.train, whole.train), (data.test, whole.test)):
        indices = np.arange(len(other))
        assert np.array_equal(split.read(indices), other.read(indices)) and np.array_equal(split.labels, other.labels)
    bad = spoil(tmp_path, "train/cat/2b.png")
    data = load_data(tmp_path, image_size=size, statistics=known, skip_corrupt=True)
    assert data.train.skipped == bad and len(data.train) == len(whole.train) and (data.mean, data.std) == known


def test_empty_read(tmp_path):
    for size in (8, 80):
        data = load_data(tree(tmp_path), image_size=size)
        assert data.train.read(np.arange(0), np.random.default_rng(0)).shape == (0, 3, size, size)
