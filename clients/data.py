"""Data sources: from a task and a place to a `Source`, with preprocessing by public constants only.

Built-in sources are the members of `SourceName`; any other data set comes with a task as a callable. Data
sets are looked for, and downloaded to, the folder in the environment variable ``TACIT_DATA`` (default
``~/.cache/tacit``).

Two readers of the same files want different things. A simulation wants to hear about a bad record
(``strict=True``); a data holder must not let one be noticed, so there it is kept and marked invalid
(``strict=False``, guarantee G12). Faults of the data set as a whole (no such file, another schema) are errors
for both: a holder's preflight finds them locally, before any charge.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import socket
import tomllib
import zlib
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset

from clients import ratings
from clients.places import Opens, Place, entries_of, from_environment, place_of, stream_of
from clients.records import Records, faults, sanitize
from clients.tables import SUFFIXES, Schema, Table, encode, parse_schema, read_schema, read_table
from models.ratings import SHAPE as RATING_SHAPE
from models.ratings import STARS
from models.shape import Shape
from models.task import Features, Task
from privacy.errors import DataError, TacitError

__all__ = ["Records", "Source", "SourceName", "data_folder", "faults", "load_source", "sanitize"]

# An image file that claims more than this is refused unread: a small file can unpack to gigabytes.
_MOST_PIXELS = 2**26
_MOST_FILE_BYTES = 2**26
_PIECE = 256
# One float32 tensor of a whole image folder; 2**32 values are 16 GB.
_MOST_VALUES = 2**32
_CONNECT_S = 20.0


class SourceName(StrEnum):
    """Built-in data sources."""

    DIGITS = "digits"
    BREAST_CANCER = "breast-cancer"
    TABLE = "table"
    IMAGE_FOLDER = "image-folder"
    MNIST = "mnist"
    FASHION_MNIST = "fashion-mnist"
    CIFAR10 = "cifar10"
    MOVIELENS = "movielens-100k"
    SST2 = "sst2"
    SHAKESPEARE = "shakespeare"
    SHAKESPEARE_GPT2 = "shakespeare-gpt2"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A data set, ready for training.

    Attributes:
        name: Name of the source.
        shape: Public shape of the records.
        train: Training records. Secret.
        test: The server's public test set; empty where a data holder has none.
        declared_records: Public number of training records, from the documentation of the data set; None
            where nobody declared it. Never a count of these records.
        keys: Natural key of each training record, shape ``(N,)``, int64, an index into ``key_names``; or
            None.
        key_names: Names of the natural clients.
        classes: Names of the classes.
    """

    name: str
    shape: Shape
    train: Records
    test: Records
    declared_records: int | None
    keys: Tensor | None = dataclasses.field(default=None, repr=False)
    key_names: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    classes: tuple[str, ...]


def data_folder() -> Path:
    """Returns the folder of data sets: ``TACIT_DATA``, or ``~/.cache/tacit``."""
    return Path(os.environ.get("TACIT_DATA") or Path.home() / ".cache" / "tacit").expanduser()


def load_source(
    task: Task,
    *,
    data: str | None = None,
    options: Mapping[str, str] | None = None,
    strict: bool = True,
    opens: Opens = from_environment,
) -> Source:
    """Loads the data of a task.

    Args:
        task: Its ``data`` names a built-in source or is a callable.
        data: Where the data lies: a folder or a schema file for ``table``, a folder for ``image-folder``, the
            download folder for ``mnist``, ``fashion-mnist`` and ``cifar10``, or for the last one a folder of its
            images, a folder or zip for ``movielens-100k`` and ``sst2``, a text file, plain or gzipped, for the
            ``shakespeare`` sources. None
            or "" for the others. A relative path is looked for in the current folder, then in `data_folder`. Folders
            of tables, images and texts may be sealed
            (`clients.places`); they are opened in memory.
        options: For ``image-folder`` only: ``size`` (pixels a side) and ``mode`` ("RGB" or "L"), over those
            in the folder's ``images.toml``.
        strict: True in a simulation: a bad record is an error. False at a data holder: it is marked invalid.
        opens: Returns the keys of a sealed data set; asked only where it is sealed.

    Raises:
        DataError: The data is missing, is not what its schema says, or, if strict, holds a bad record.
        VaultError: It is sealed, and there is no key for it or it was altered.
    """
    source = _loaded(task, data, dict(options or {}), strict, opens)
    return source if task.features is None else _through(source, task, task.features)


def _through(source: Source, task: Task, features: Features) -> Source:
    """The same source, each record replaced by its features."""
    return dataclasses.replace(
        source,
        shape=_features_shape(task, features, source.shape),
        train=_features_of(source.train, features),
        test=_features_of(source.test, features),
    )


def _features_shape(task: Task, features: Features, shape: Shape) -> Shape:
    try:
        return features.shape_of(shape)
    except ValueError as error:
        raise DataError(f"task {task.name!r}: {error}") from error


def _features_of(records: Records, features: Features) -> Records:
    """Records after a fixed map; those that were faulty give features that are faulty too, or marked as before."""
    if not len(records):
        return records
    # In pieces, so that what the map needs on the way stays small beside the features themselves.
    pieces = [features(some) for some in torch.split(records.inputs, _PIECE)]
    return dataclasses.replace(records, inputs=torch.cat(pieces))


def _loaded(task: Task, data: str | None, options: Mapping[str, str], strict: bool, opens: Opens) -> Source:
    """A task's records as its source has them, before any features."""
    known = ("size", "mode") if task.data == SourceName.IMAGE_FOLDER else ()
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, 1)
            raise DataError(
                f"expected no data option {option!r} for task {task.name!r}; "
                + (f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known) or 'none'}")
            )
    if callable(task.data):
        _no_place(task, data)
        return _from_callable(task, task.data, strict)
    try:
        name = SourceName(task.data)
    except ValueError:
        raise DataError(
            f"expected task {task.name!r} to name a data source, got {task.data!r}; choose one of "
            f"{', '.join(SourceName)}, or give the task a callable"
        ) from None
    match name:
        case SourceName.DIGITS:
            _no_place(task, data)
            return _digits()
        case SourceName.BREAST_CANCER:
            _no_place(task, data)
            return _breast_cancer()
        case SourceName.TABLE:
            return _tables(_place(task, data, opens), strict)
        case SourceName.IMAGE_FOLDER:
            return _image_folder(_place(task, data, opens), options, strict)
        case SourceName.MNIST | SourceName.FASHION_MNIST | SourceName.CIFAR10:
            if data and name == SourceName.CIFAR10 and (place := _place(task, data, opens) / "train").is_dir():
                return _cifar_images(place.parent, strict)
            return _torchvision(name, Path(data).expanduser() if data else data_folder())
        case SourceName.MOVIELENS:
            return _movielens(data, strict)
        case SourceName.SST2:
            from clients import text

            return text.sst2(data, strict)
        case SourceName.SHAKESPEARE | SourceName.SHAKESPEARE_GPT2:
            from clients import text

            return text.shakespeare(name, data, strict)


def published(
    task: Task, data: str | None = None, *, opens: Opens = from_environment
) -> tuple[Shape | None, int | None]:
    """Returns what is public about a task's data, without reading a record: shape, and number of training records.

    Args:
        task: As for `load_source`.
        data: As for `load_source`; of a table, only its schema is read.
        opens: As for `load_source`.

    Returns:
        None for either where nobody published it, or where only the data itself would tell.

    Raises:
        DataError: A table's schema is damaged.
    """
    shape, records = _published(task, data, opens)
    if shape is not None and task.features is not None:
        shape = _features_shape(task, task.features, shape)
    return shape, records


def _published(task: Task, data: str | None, opens: Opens) -> tuple[Shape | None, int | None]:
    if callable(task.data):
        return task.shape, task.declared_records
    if task.data in (SourceName.DIGITS, SourceName.BREAST_CANCER):
        source = _loaded(task, None, {}, True, opens)
        return source.shape, source.declared_records
    if task.data == SourceName.MOVIELENS:
        return RATING_SHAPE, _MOVIELENS_RECORDS
    if task.data in (SourceName.SST2, SourceName.SHAKESPEARE, SourceName.SHAKESPEARE_GPT2):
        from clients import text

        return text.published(SourceName(task.data))
    if task.data == SourceName.TABLE and data:
        path = _place(task, data, opens)
        schema = read_schema(path / "schema.toml" if path.is_dir() else path)
        return schema.shape, schema.records
    known = next((facts for name, facts in _PUBLISHED.items() if name == task.data), None)
    return (known.shape, known.records) if known is not None else (None, None)


def _no_place(task: Task, data: str | None) -> None:
    if data:
        raise DataError(f"expected no data for task {task.name!r}, which brings its own, got {data!r}; leave it out")


def _place(task: Task, data: str | None, opens: Opens) -> Place:
    """The path where a task's data lies."""
    if not data:
        raise DataError(f"expected data=PATH for task {task.name!r}, got none; say where its data lies")
    given = Path(data).expanduser()
    for path in (given, data_folder() / given):
        if path.exists():
            return place_of(path, opens)
    raise DataError(f"expected data at {given} or {data_folder() / given}, found neither; check data=PATH")


def _tested(count: int, multiplier: int, test: int) -> Tensor:
    """Marks the test records of a fixed split: those which i -> multiplier * i mod count takes below
    ``test``.

    With a multiplier that has no factor in common with the count this is a permutation, the same on every
    machine and for every version of every library.
    """
    return torch.arange(count) * multiplier % count < test


# 100,000 ratings are published, of which each user's last fifth is held out.
_MOVIELENS_RECORDS = 80_000


def _movielens(data: str | None, strict: bool) -> Source:
    """MovieLens 100K; each user is a natural client."""
    found = ratings.load(ratings.where(data, data_folder()), strict)
    return Source(
        name=SourceName.MOVIELENS,
        shape=RATING_SHAPE,
        train=found.train,
        test=found.test,
        declared_records=_MOVIELENS_RECORDS,
        keys=found.users,
        key_names=found.names,
        classes=tuple(f"{number} star{'s' * (number > 1)}" for number in range(1, STARS + 1)),
    )


def _all_valid(inputs: Tensor, targets: Tensor) -> Records:
    return Records(inputs, targets, torch.ones(len(targets), dtype=torch.bool))


def _digits() -> Source:
    """scikit-learn's 1797 handwritten digits, 8x8 pixels of 0 to 16: 1437 to train on, 360 to test on."""
    from sklearn.datasets import load_digits

    found = load_digits()
    inputs = torch.from_numpy(found.images.astype(np.float32) / 16).unsqueeze(1)  # (N, 1, 8, 8)
    every = _all_valid(inputs, torch.from_numpy(found.target.astype(np.int64)))
    tested = _tested(1797, 1013, 360)
    return Source(
        name=SourceName.DIGITS,
        shape=Shape(inputs=(1, 8, 8), classes=10),
        train=every.take((~tested).nonzero()[:, 0]),
        test=every.take(tested.nonzero()[:, 0]),
        declared_records=1437,
        classes=tuple("0123456789"),
    )


# Bounds of the Wisconsin diagnostic breast cancer table (mean, standard error, worst of ten measurements):
# the ranges in its public documentation, rounded outwards.
_BREAST_CANCER_BOUNDS: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "radius": ((5, 30), (0, 3), (5, 40)),
    "texture": ((5, 40), (0, 5), (10, 50)),
    "perimeter": ((40, 200), (0, 25), (50, 260)),
    "area": ((100, 2600), (0, 600), (100, 4500)),
    "smoothness": ((0.05, 0.17), (0, 0.04), (0.05, 0.25)),
    "compactness": ((0, 0.4), (0, 0.15), (0, 1.1)),
    "concavity": ((0, 0.45), (0, 0.4), (0, 1.3)),
    "concave points": ((0, 0.25), (0, 0.06), (0, 0.3)),
    "symmetry": ((0.1, 0.35), (0, 0.08), (0.1, 0.7)),
    "fractal dimension": ((0.04, 0.1), (0, 0.03), (0.05, 0.25)),
}


def breast_cancer_schema() -> Schema:
    """Returns the public schema of the breast cancer table; malignant is the second, positive class."""
    columns = {
        name: {"kind": "number", "min": low, "max": high}
        for place, pattern in enumerate(("mean {}", "{} error", "worst {}"))
        for name, (low, high) in (
            (pattern.format(measure), bounds[place]) for measure, bounds in _BREAST_CANCER_BOUNDS.items()
        )
    }
    content = {"target": "diagnosis", "classes": ["benign", "malignant"], "records": 455, "columns": columns}
    return parse_schema(content, "breast-cancer")


def _breast_cancer() -> Source:
    """scikit-learn's 569 tumours, read as any table is: 455 to train on, 114 to test on."""
    from sklearn.datasets import load_breast_cancer

    found = load_breast_cancer()
    cells: dict[str, list[object]] = {
        name: found.data[:, place].tolist() for place, name in enumerate(found.feature_names.tolist())
    }
    cells["diagnosis"] = [str(found.target_names[target]) for target in found.target]
    schema = breast_cancer_schema()
    every = encode(cells, schema, where=SourceName.BREAST_CANCER, strict=True).records
    tested = _tested(569, 353, 114)
    return Source(
        name=SourceName.BREAST_CANCER,
        shape=schema.shape,
        train=every.take((~tested).nonzero()[:, 0]),
        test=every.take(tested.nonzero()[:, 0]),
        declared_records=schema.records,
        classes=schema.classes,
    )


def _tables(path: Place, strict: bool) -> Source:
    """A schema with one training file, or one file a client; and a test file, or a share to set aside."""
    schema_path = path / "schema.toml" if path.is_dir() else path
    schema = read_schema(schema_path)
    files = [file for file in entries_of(schema_path.parent) if file.suffix in SUFFIXES]
    tests = [file for file in files if file.stem == "test"]
    trains = [file for file in files if file.stem == "train"]
    sites = [file for file in files if file.stem not in ("train", "test")]
    folder = schema_path.parent
    if len(tests) > 1 or len(trains) > 1:
        twice = tests if len(tests) > 1 else trains
        raise DataError(f"{folder}: expected one of {twice[0].name} and {twice[1].name}, got both; remove one")
    if bool(trains) == bool(sites):
        raise DataError(
            f"{folder}: expected either a file train.csv or train.parquet, or one file for each client, got "
            + (f"train and {sites[0].name}; move one away" if sites else "neither; put the data beside the schema")
        )
    if sites and schema.client is not None:
        raise DataError(
            f"{schema_path}: expected no client column beside one file a client, got "
            f"client={schema.client!r}; "
            "describe that column as ignored"
        )
    stems = [file.stem for file in sites]
    if len(set(stems)) < len(stems):
        twice_named = next(stem for stem in stems if stems.count(stem) > 1)
        raise DataError(f"{folder}: expected one file for client {twice_named!r}, got two; remove one")
    parts = [read_table(file, schema, strict=strict) for file in trains or sites]
    train = Records(*(torch.cat(list(column)) for column in zip(*map(_columns, parts), strict=True)))
    keys, key_names = _keys(parts, tuple(stems))
    if tests:
        # The test set is the server's and public, so a bad record in it is an error for everybody.
        test = read_table(tests[0], dataclasses.replace(schema, client=None, ignored=_also_client(schema)), strict=True)
        held_out = test.records
    elif strict:
        if schema.test_fraction is None:
            raise DataError(
                f"{folder}: expected a file test.csv or test.parquet, got none; add one, or test-fraction to the schema"
            )
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        edge = round(len(train) * schema.test_fraction)
        held_out = train.take(order[:edge])
        rest = order[edge:].sort().values
        train, keys = train.take(rest), None if keys is None else keys[rest]
        if not len(held_out) or not len(train):
            raise DataError(f"{folder}: expected records for training and for testing, got too few to set some aside")
    else:
        held_out = train.take(torch.empty(0, dtype=torch.int64))
    return Source(
        name=SourceName.TABLE,
        shape=schema.shape,
        train=train,
        test=held_out,
        declared_records=schema.records,
        keys=keys,
        key_names=key_names,
        classes=schema.classes,
    )


def _columns(table: Table) -> tuple[Tensor, Tensor, Tensor]:
    return table.records.inputs, table.records.targets, table.records.valid


def _also_client(schema: Schema) -> tuple[str, ...]:
    """The columns that a test file may have and nobody reads: who a test record came from does not matter."""
    return schema.ignored if schema.client is None else (*schema.ignored, schema.client)


def _keys(parts: list[Table], stems: tuple[str, ...]) -> tuple[Tensor | None, tuple[str, ...]]:
    """The natural key of each record and the keys' names: one file a client, or the client column."""
    if stems:
        sizes = torch.tensor([len(part.records) for part in parts])
        return torch.repeat_interleave(torch.arange(len(parts)), sizes), stems
    if parts[0].clients is None:
        return None, ()
    names, codes = np.unique(np.array(parts[0].clients, dtype=np.str_), return_inverse=True)
    return torch.from_numpy(codes.astype(np.int64)), tuple(names.tolist())


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ImageRules:
    """Public description of an image folder."""

    size: int
    mode: str
    classes: tuple[str, ...]
    records: int | None

    @property
    def shape(self) -> Shape:
        return Shape(inputs=(3 if self.mode == "RGB" else 1, self.size, self.size), classes=len(self.classes))


def _image_rules(folder: Place, options: Mapping[str, str]) -> _ImageRules:
    """The rules from ``images.toml``, where there is one, and the options over them."""
    path = folder / "images.toml"
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"expected {path} to be TOML, got {error}") from error
    for key in content:
        if key not in ("size", "mode", "classes", "records"):
            raise DataError(f"{path}: expected only the keys size, mode, classes and records, got {key!r}")
    content |= options
    size = str(content.get("size", 32))
    if not size.isdecimal() or not 4 <= int(size) <= 1024:
        raise DataError(f"{folder}: expected an image size of 4 to 1024 pixels, got {size!r}")
    mode = content.get("mode", "RGB")
    if mode not in ("RGB", "L"):
        raise DataError(f'{folder}: expected the image mode "RGB" or "L", got {mode!r}')
    records = content.get("records")
    if records is not None and (not isinstance(records, int) or isinstance(records, bool) or records < 1):
        raise DataError(f"{path}: expected records to be a whole number >= 1, got {records!r}")
    train = folder / "train"
    if not train.is_dir():
        raise DataError(f"{folder}: expected a folder train with a folder for each class, got none")
    listed = content.get("classes")
    if listed is None:
        listed = sorted(entry.name for entry in train.iterdir() if entry.is_dir())
    if not isinstance(listed, list) or len(listed) < 2 or not all(isinstance(name, str) for name in listed):
        raise DataError(f"{folder}: expected at least two classes, as folders of train or in images.toml, got {listed}")
    return _ImageRules(size=int(size), mode=mode, classes=tuple(listed), records=records)


def _image_folder(folder: Place, options: Mapping[str, str], strict: bool) -> Source:
    """Images as train/CLASS/*.png|jpg and test/CLASS/*, resized and scaled to [-1, 1]."""
    rules = _image_rules(folder, options)
    if strict and not (folder / "test").is_dir():
        raise DataError(f"{folder}: expected a folder test with a folder for each class, got none; set images aside")
    return Source(
        name=SourceName.IMAGE_FOLDER,
        shape=rules.shape,
        train=_images(folder / "train", rules, strict),
        test=_images(folder / "test", rules, strict=True),
        declared_records=rules.records,
        classes=rules.classes,
    )


def _images(folder: Place, rules: _ImageRules, strict: bool) -> Records:
    """All images of a folder of classes, in the order of class and file name."""
    found: list[tuple[Place, int]] = []
    for place in entries_of(folder) if folder.is_dir() else ():
        if not place.is_dir():
            continue
        if place.name not in rules.classes:
            raise DataError(f"{place}: expected a class among {', '.join(rules.classes)}; list it in images.toml")
        target = rules.classes.index(place.name)
        found += [(file, target) for file in entries_of(place) if file.suffix.lower() in (".png", ".jpg", ".jpeg")]
    shape = rules.shape.inputs
    if len(found) * int(np.prod(shape)) > _MOST_VALUES:
        raise DataError(
            f"{folder}: expected at most {_MOST_VALUES} values, got {len(found)} images of {shape}; use a smaller size"
        )
    inputs = torch.zeros((len(found), *shape))
    targets = torch.tensor([target for _, target in found], dtype=torch.int64)
    valid = torch.ones(len(found), dtype=torch.bool)
    for index, (file, _) in enumerate(found):
        try:
            inputs[index] = _image(file, rules)
        except DataError:
            if strict:
                raise
            valid[index] = False
            targets[index] = 0
    return Records(inputs, targets, valid)


def _image(file: Place, rules: _ImageRules) -> Tensor:
    """One image, shape ``(C, size, size)`` in [-1, 1]."""
    return image_of(file, rules.size, rules.mode).div_(127.5).sub_(1)


def image_of(file: Place, size: int, mode: str) -> Tensor:
    """Returns one image, shape ``(C, size, size)``, of 0 to 255; its size is read and checked before its pixels are.

    Args:
        file: PNG or JPEG, sealed or not.
        size: Pixels a side; an image of another size is resized.
        mode: "L" for one channel, "RGB" for three.

    Raises:
        DataError: It is no whole image, or too large.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with stream_of(file) as stream:
            if stream.seek(0, os.SEEK_END) > _MOST_FILE_BYTES:
                raise DataError(
                    f"{file}: expected an image file of at most {_MOST_FILE_BYTES} bytes; shrink or remove it"
                )
            stream.seek(0)
            with Image.open(stream, formats=("PNG", "JPEG")) as image:
                if image.width * image.height > _MOST_PIXELS:
                    raise DataError(
                        f"{file}: expected at most {_MOST_PIXELS} pixels, got {image.size}; shrink or remove it"
                    )
                picture = image.convert(mode)
        if picture.size != (size, size):
            picture = picture.resize((size, size), Image.Resampling.BILINEAR)
    except (
        OSError,
        SyntaxError,
        ValueError,
        zlib.error,
        UnidentifiedImageError,
        Image.DecompressionBombError,
    ) as error:
        # Pillow reports damage as any of these, depending on where in the file it is.
        raise DataError(f"{file}: expected a whole PNG or JPEG image, got {error}; replace or remove it") from error
    pixels = np.asarray(picture, dtype=np.float32).reshape(size, size, -1)  # (H, W, C)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def image_rules_of(task: Task, data: str) -> _ImageRules:
    """Returns the public rules of a task's folder of images; raises DataError where they are damaged."""
    return _image_rules(_place(task, data, from_environment), {})


def schema_of(task: Task, data: str) -> Schema:
    """Returns the public schema of a task's table; raises DataError where it is damaged."""
    path = _place(task, data, from_environment)
    return read_schema(path / "schema.toml" if path.is_dir() else path)


def size_of(task: Task) -> int:
    """Returns how many pixels a side the images of a task's published data set have, before any features."""
    return next(facts.shape.inputs[1] for name, facts in _PUBLISHED.items() if name == task.data)


def constants_of(task: Task) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and deviation of each channel, as published for a task's data set.

    Raises:
        DataError: The task names no published set of images.
    """
    for name, facts in _PUBLISHED.items():
        if name == task.data:
            return facts.mean, facts.deviation
    raise DataError(f"expected task {task.name!r} to name a published set of images, got {task.data!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Published:
    """A torchvision data set and its public constants: mean and deviation of each channel, as published for
    it."""

    dataset: str
    shape: Shape
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    records: int
    files: str


_PUBLISHED = {
    SourceName.MNIST: _Published(
        dataset="MNIST",
        shape=Shape(inputs=(1, 28, 28), classes=10),
        mean=(0.1307,),
        deviation=(0.3081,),
        records=60_000,
        files="MNIST/raw/train-images-idx3-ubyte.gz and its three companions",
    ),
    SourceName.FASHION_MNIST: _Published(
        dataset="FashionMNIST",
        shape=Shape(inputs=(1, 28, 28), classes=10),
        mean=(0.2860,),
        deviation=(0.3530,),
        records=60_000,
        files="FashionMNIST/raw/train-images-idx3-ubyte.gz and its three companions",
    ),
    SourceName.CIFAR10: _Published(
        dataset="CIFAR10",
        shape=Shape(inputs=(3, 32, 32), classes=10),
        mean=(0.4914, 0.4822, 0.4465),
        deviation=(0.2470, 0.2435, 0.2616),
        records=50_000,
        files="cifar-10-python.tar.gz",
    ),
}


def _torchvision(name: SourceName, folder: Path) -> Source:
    """A torchvision data set, downloaded where it is not there yet."""
    import torchvision.datasets

    published = _PUBLISHED[name]
    make = getattr(torchvision.datasets, published.dataset)
    train, test = (_fetch(make, published, folder, part) for part in (True, False))
    return Source(
        name=name,
        shape=published.shape,
        train=_pixels(train, published),
        test=_pixels(test, published),
        declared_records=published.records,
        classes=tuple(str(label) for label in train.classes),
    )


_CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _cifar_images(folder: Place, strict: bool) -> Source:
    """CIFAR-10 as images in train/CLASS and test/CLASS, as some mirrors pack it; lossy where they are JPEG."""
    published = _PUBLISHED[SourceName.CIFAR10]
    rules = _ImageRules(size=32, mode="RGB", classes=_CIFAR_CLASSES, records=published.records)
    mean, deviation = _constants(published)
    parts = []
    for part, exact in (("train", strict), ("test", True)):
        records = _images(folder / part, rules, strict=exact)
        parts.append(
            # From [-1, 1] to [0, 1], then by the public constants.
            dataclasses.replace(records, inputs=records.inputs.add_(1).div_(2).sub_(mean).div_(deviation))
        )
    train, test = parts
    if strict and not len(test):
        raise DataError(f"{folder}: expected test images in test/CLASS, got none; add them")
    return Source(
        name=SourceName.CIFAR10,
        shape=published.shape,
        train=train,
        test=test,
        declared_records=published.records,
        classes=_CIFAR_CLASSES,
    )


def _constants(published: _Published) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel, each of shape ``(1, C, 1, 1)``."""
    mean, deviation = (torch.tensor(values).view(1, -1, 1, 1) for values in (published.mean, published.deviation))
    return mean, deviation


def _fetch(make: Callable[..., Any], published: _Published, folder: Path, train: bool) -> Any:
    """The training or test part, from the folder or else from the network."""
    try:
        return make(str(folder), train=train, download=False)
    except (RuntimeError, OSError, ValueError):
        pass  # Not there, or damaged: a download makes it whole.
    before = socket.getdefaulttimeout()
    # torchvision opens its addresses without a timeout, and behind some firewalls that is for ever.
    socket.setdefaulttimeout(_CONNECT_S)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return make(str(folder), train=train, download=True)
    except (RuntimeError, OSError, ValueError, EOFError) as error:
        raise DataError(
            f"expected {published.dataset} under {folder}, found none, and its download failed "
            f"({type(error).__name__}: {' '.join(str(error).split())}); connect to the internet, "
            f"or put {published.files} there "
            "(TACIT_DATA=FOLDER chooses another place)"
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def _pixels(dataset: Any, published: _Published) -> Records:
    """All images at once, normalised by the public constants."""
    raw = torch.as_tensor(dataset.data)
    images = raw.unsqueeze(1) if raw.dim() == 3 else raw.permute(0, 3, 1, 2)  # (N, C, H, W)
    mean, deviation = _constants(published)
    inputs = images.float().div_(255).sub_(mean).div_(deviation).contiguous()
    return _all_valid(inputs, torch.as_tensor(dataset.targets).to(torch.int64))


def _from_callable(task: Task, make: Callable[[], Any], strict: bool) -> Source:
    """Anybody's pair of map-style torch datasets."""
    if task.shape is None:
        raise DataError(f"expected task {task.name!r} to declare the shape of its records; add shape=Shape(...)")
    try:
        pair = make()
    except TacitError:
        raise
    except Exception as error:  # Somebody else's loader may fail in any way; a person needs one sentence.
        raise DataError(
            f"expected the data of task {task.name!r}, its loader failed with {type(error).__name__}: {error}"
        ) from error
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise DataError(
            f"expected the data of task {task.name!r} to be a pair (train, test), got {type(pair).__name__}"
        )
    train, test = pair
    names = getattr(train, "classes", None)
    if names is not None and len(names) != task.shape.classes:
        raise DataError(
            f"expected {task.shape.classes} classes as in the shape of task {task.name!r}, its training set "
            "names "
            f"{len(names)}; correct either"
        )
    return Source(
        name=task.name,
        shape=task.shape,
        train=_stack(train, task.shape, "training", strict),
        test=_stack(test, task.shape, "test", strict=True),
        declared_records=task.declared_records,
        classes=tuple(str(name) for name in (names if names is not None else range(task.shape.classes))),
    )


def _stack(dataset: Any, shape: Shape, part: str, strict: bool) -> Records:
    """A map-style dataset as tensors; each item is an (input, class) pair, or (input, classes) of a sequence."""
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise DataError(
            f"expected a map-style {part} set with a length, got {type(dataset).__name__}; Poisson sampling "
            "draws "
            "records by index, so collect them into a TensorDataset"
        )
    count = len(dataset)
    records = Records.blank(shape, count)
    for index, item in enumerate(_items(dataset)):
        try:
            records.inputs[index], records.targets[index] = _pair(item, shape)
            records.valid[index] = True
        except DataError as error:
            if strict:
                raise DataError(f"{part} record {index}: {error}") from error
    return records


def _items(dataset: Any) -> Iterator[Any]:
    """Each item, or the exception that reading it raised."""
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
        yield from zip(*dataset.tensors, strict=True)
        return
    for index in range(len(dataset)):
        try:
            yield dataset[index]
        except Exception as error:  # Somebody else's loader may fail in any way on one bad record.
            yield error


def _pair(item: object, shape: Shape) -> tuple[Tensor, Tensor]:
    """One item as input and class, or classes."""
    if isinstance(item, Exception):
        raise DataError(f"expected a readable record, got {type(item).__name__}: {item}")
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise DataError(f"expected a pair (input, class), got {type(item).__name__}; return both from the dataset")
    try:
        value, label = torch.as_tensor(item[0]), torch.as_tensor(item[1])
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"expected tensors or numbers, got {error}; convert them in the dataset") from error
    if shape.tokens and (value.is_floating_point() or value.is_complex()):
        raise DataError(f"expected whole numbers as tokens, got {value.dtype}; encode the text in the dataset")
    if not shape.tokens and not value.is_floating_point():
        raise DataError(
            f"expected floating point inputs, got {value.dtype}; scale them by a public constant, as in pixels / 255"
        )
    if tuple(value.shape) != shape.inputs:
        raise DataError(f"expected an input of shape {shape.inputs}, got {tuple(value.shape)}")
    whole = not (label.is_floating_point() or label.is_complex() or label.dtype == torch.bool)
    if not shape.targets and not (whole and label.numel() == 1):
        raise DataError(f"expected one whole number as class, got {label.dtype} of shape {tuple(label.shape)}")
    if not whole or label.numel() != math.prod(shape.targets):
        raise DataError(
            f"expected whole numbers of shape {shape.targets} as classes, got {label.dtype} of shape "
            f"{tuple(label.shape)}"
        )
    return value, label.reshape(shape.targets)
