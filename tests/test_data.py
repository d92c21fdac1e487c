from __future__ import annotations

import dataclasses
import io
import itertools
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from psap import data
from psap.data import cifar
from psap.data.digits import digits_images
from psap.data.loader import Subset, TensorImages, split
from psap.errors import ArgumentError, FileError, PsapError

RNG = np.random.default_rng(0)
IDENTITY = data.Normalise(scale=1.0, mean=(0.0,), std=(1.0,))


def same(a, b) -> bool:
    return all(
        torch.equal(x, u) and torch.equal(y, v)
        for (x, y), (u, v) in itertools.zip_longest(a, b, fillvalue=(None, None))
    )


def positions(loader: data.Loader) -> set[int]:
    """The positions of a loader's images in the set they were all taken from."""
    indices, source = torch.arange(len(loader.images)), loader.images
    while isinstance(source, Subset):
        indices, source = source.indices[indices], source.source
    return set(indices.tolist())


def picture(size: tuple[int, int] = (32, 32)) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def write_parquet(path: Path, images: list[bytes], labels: list[int]) -> None:
    rows = [{"bytes": image, "path": f"{index}.png"} for index, image in enumerate(images)]
    pq.write_table(pa.table({"img": rows, "label": labels}), path)


def write_binary(path: Path, labels: list[int]) -> np.ndarray:
    records = RNG.integers(0, 256, (len(labels), cifar.RECORD), dtype=np.uint8)
    records[:, 0] = labels
    records.tofile(path)
    return records


# Digits


def test_digits_are_the_whole_set():
    images = digits_images()
    assert images.images.shape == (1797, 1, 8, 8)
    assert images.images.dtype == torch.uint8
    assert (images.images.min(), images.images.max()) == (0, 16)
    counts = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert torch.bincount(images.labels).tolist() == counts


def test_digits_batches():
    spec = data.load("digits", batch_size=64)
    assert (spec.name, spec.num_classes, spec.channels, spec.size) == ("digits", 10, 1, 8)
    x, y = next(iter(spec.train))
    assert (x.shape, x.dtype, y.shape, y.dtype) == (
        (64, 1, 8, 8),
        torch.float32,
        (64,),
        torch.int64,
    )
    assert x.stride() == (64, 1, 8, 1)
    raw = torch.cat([x for x, _ in spec.test])
    assert abs(raw.mean()) < 0.05
    assert abs(raw.std() - 1) < 0.05


def test_digits_parts_are_disjoint_and_complete():
    spec = data.load_digits(seed=3)
    parts = [positions(loader) for loader in (spec.train, spec.val, spec.test)]
    assert [len(part) for part in parts] == [1294, 144, 359]
    assert set.union(*parts) == set(range(1797))


def test_seed_decides_everything():
    one, two, other = (data.load_digits(seed=seed) for seed in (1, 1, 2))
    for part in ("train", "val", "test"):
        assert same(getattr(one, part), getattr(two, part))
        assert positions(getattr(one, part)) != positions(getattr(other, part))


def test_no_validation_images():
    spec = data.load_digits(val_share=0.0)
    assert spec.val is None
    assert len(spec.train.images) == 1438


def test_damaged_digits_are_named(monkeypatch, tmp_path):
    (tmp_path / "digits.npz").write_bytes(b"PK\x03\x04 truncated")
    monkeypatch.setattr("psap.data.digits.files", lambda _: tmp_path)
    with pytest.raises(FileError, match=r"digits\.npz cannot be read .* reinstall psap"):
        digits_images()


# Loader and augmentation


def test_epochs_do_not_depend_on_history():
    loader = data.load_digits().train
    fifth = list(loader.epoch(5))
    interrupted = loader.epoch(2)
    next(interrupted)
    assert same(loader.epoch(5), fifth)
    assert same(data.load_digits().train.epoch(5), fifth)
    assert not torch.equal(next(loader.epoch(4))[1], fifth[0][1])


@given(start=st.integers(0, 15))
def test_an_epoch_resumes_at_any_batch(start):
    loader = data.load_digits().train
    assert same(loader.epoch(1, start=start), itertools.islice(loader.epoch(1), start, None))


def test_the_global_generators_are_neither_read_nor_moved():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = list(data.load_digits().train.epoch(0))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(data.load_digits().train.epoch(0), first)


def test_every_image_comes_once_and_the_last_batch_is_smaller():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    source = TensorImages(images=images, labels=torch.arange(10))
    loader = data.Loader(images=source, batch_size=4, normalise=IDENTITY, shuffle=True)
    batches = list(loader.epoch(7))
    assert [len(y) for _, y in batches] == [4, 4, 2]
    assert len(loader) == 3
    labels = torch.cat([y for _, y in batches])
    assert labels.tolist() != list(range(10))
    assert sorted(labels.tolist()) == list(range(10))
    assert torch.equal(torch.cat([x for x, _ in batches]).flatten().long(), labels)


@given(
    shift=st.integers(0, 3),
    flip=st.booleans(),
    shape=st.tuples(*(st.integers(1, 5),) * 4),
    seed=st.integers(0, 2**32),
)
def test_augmentation_against_a_loop(shift, flip, shape, seed):
    rng = np.random.default_rng(seed)
    raw = torch.from_numpy(rng.integers(1, 256, shape, dtype=np.uint8))
    augment = data.Augment(flip=flip, shift=shift)
    draws = augment.draw(shape[0], rng)
    out = augment.apply(raw, draws)
    assert out.dtype == torch.uint8
    for image, (mirrored, top, left), got in zip(raw, draws.tolist(), out, strict=True):
        assert mirrored in ((0, 1) if flip else (0,))
        wanted = np.pad(image, ((0, 0), (shift, shift), (shift, shift)))
        if mirrored:
            wanted = np.pad(image.flip(2), ((0, 0), (shift, shift), (shift, shift)))
        wanted = wanted[:, top : top + shape[2], left : left + shape[3]]
        assert np.array_equal(got.numpy(), wanted)


def test_augmentation_draws_cover_their_range():
    draws = data.Augment(flip=True, shift=2).draw(1000, np.random.default_rng(0))
    assert draws.unique(dim=0).shape[0] == 2 * 5 * 5
    assert (draws.min(0).values.tolist(), draws.max(0).values.tolist()) == ([0, 0, 0], [1, 4, 4])


def test_normalise():
    normalise = data.Normalise(scale=2.0, mean=(1.0, 0.0), std=(0.5, 4.0))
    x = normalise(torch.tensor([4, 8], dtype=torch.uint8).view(1, 2, 1, 1))
    assert x.flatten().tolist() == [2.0, 1.0]


def test_split():
    rest, part = split(10, 0.3, 0)
    assert sorted([*rest.tolist(), *part.tolist()]) == list(range(10))
    assert len(part) == 3
    assert part.tolist() == sorted(part.tolist())
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ArgumentError, match=r"share is .*; pass a number in \[0, 1\)"):
            split(10, share, 0)
    with pytest.raises(ArgumentError, match="leave at least one"):
        split(2, 0.9, 0)


def test_bad_options():
    spec = data.load_digits()
    with pytest.raises(ArgumentError, match="batch_size is 0"):
        data.load_digits(batch_size=0)
    with pytest.raises(ArgumentError, match="seed is -1"):
        data.load_digits(seed=-1)
    with pytest.raises(ArgumentError, match="shift is -1"):
        data.Augment(shift=-1)
    with pytest.raises(ArgumentError, match="epoch -1 and start 0"):
        spec.train.epoch(-1)
    empty = TensorImages(images=torch.empty(0, 1, 1, 1), labels=torch.empty(0))
    with pytest.raises(ArgumentError, match="no image to load"):
        dataclasses.replace(spec.train, images=empty)
    with pytest.raises(ArgumentError, match="data is 'mnist'; pass one of digits, cifar10"):
        data.load("mnist")
    with pytest.raises(ArgumentError, match="pass the folder that holds cifar10"):
        data.load("cifar10")


# CIFAR-10


def test_cifar_parquet_shards(tmp_path):
    images = [picture() for _ in range(5)]
    files = [encoded(image) for image in images]
    write_parquet(tmp_path / "train-00000-of-00002.parquet", files[:2], [0, 1])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", files[2:4], [2, 9])
    write_parquet(tmp_path / "test.parquet", files[4:], [4])
    spec = data.load("cifar10", data_dir=tmp_path, val_share=0.0)
    assert (spec.channels, spec.size, spec.classes[9], spec.val) == (3, 32, "truck", None)
    raw, labels = spec.train.images.take(torch.arange(4))
    assert labels.tolist() == [0, 1, 2, 9]
    for image, got in zip(images, raw, strict=False):
        assert np.array_equal(got.permute(1, 2, 0).numpy(), np.asarray(image))
    x, y = next(iter(spec.test))
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert y.tolist() == [4]


def test_cifar_binary(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    records = [write_binary(folder / f"data_batch_{part}.bin", [part, 9]) for part in (1, 2)]
    write_binary(folder / "test_batch.bin", [3])
    spec = data.load_cifar10(tmp_path, val_share=0.25)
    assert (len(spec.train.images), len(spec.val.images), len(spec.test.images)) == (3, 1, 1)
    images = spec.train.images.source
    assert images.labels.tolist() == [1, 9, 2, 9]
    assert np.array_equal(images.images.flatten(1).numpy(), np.concatenate(records)[:, 1:])


def test_cifar_files_that_cannot_be_used(tmp_path):
    with pytest.raises(FileError, match=r"holds no CIFAR-10; wanted train\.parquet"):
        data.load_cifar10(tmp_path)
    (tmp_path / "data_batch_1").write_bytes(b"\x80\x02")
    with pytest.raises(FileError, match="loading a pickle runs code; use the binary release"):
        data.load_cifar10(tmp_path)
    (tmp_path / "test_batch.bin").write_bytes(b"short")
    write_binary(tmp_path / "data_batch_1.bin", [0, 1, 10])
    with pytest.raises(
        FileError, match=r"data_batch_1\.bin, row 2: the label is 10; wanted 0 to 9"
    ):
        data.load_cifar10(tmp_path)
    write_binary(tmp_path / "data_batch_1.bin", [0])
    with pytest.raises(FileError, match=r"test_batch\.bin has 5 bytes, not a positive multiple"):
        data.load_cifar10(tmp_path)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([encoded(picture()), b"no image"], r"train\.parquet, row 1 cannot be decoded"),
        ([encoded(picture())[:-40]], r"train\.parquet, row 0 cannot be decoded"),
        ([encoded(picture((8, 9)))], r"row 0 has shape \[3, 9, 8\]; wanted \[3, 32, 32\]"),
        ([], r"train\.parquet holds no image"),
    ],
)
def test_cifar_parquet_with_bad_images(tmp_path, images, message):
    write_parquet(tmp_path / "train.parquet", images, [0] * len(images))
    write_parquet(tmp_path / "test.parquet", [encoded(picture())], [0])
    with pytest.raises(PsapError, match=message):
        data.load_cifar10(tmp_path)


def test_cifar_parquet_with_other_columns(tmp_path):
    pq.write_table(pa.table({"image": [b""], "label": [0]}), tmp_path / "train.parquet")
    (tmp_path / "test.parquet").write_bytes(b"PAR1")
    with pytest.raises(FileError, match=r"train\.parquet is no parquet file with the columns img"):
        data.load_cifar10(tmp_path)


@pytest.mark.parametrize(("module", "name"), [("pyarrow.parquet", "pyarrow"), ("PIL", "Pillow")])
def test_packages_that_are_missing(tmp_path, monkeypatch, module, name):
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}.parquet", [encoded(picture())], [0])
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(PsapError, match=rf"{name} is not installed; run: pip install psap\[data\]"):
        data.load_cifar10(tmp_path)


@pytest.mark.slow
def test_cifar_of_the_data_folder(data_dir):
    spec = data.load_cifar10(data_dir / "cifar10-jpeg", val_share=0.1)
    assert (len(spec.train.images), len(spec.val.images)) == (45000, 5000)
    assert torch.bincount(spec.test.images.labels).tolist() == [1000] * 10
