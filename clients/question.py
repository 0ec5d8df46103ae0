"""From a file to one record, as it was for training: what a client asks about, prepared on its own machine.

The published head says how: an image's mode, mean and deviation, or a table's schema. These are public constants of the
data set, the same that `clients.data` uses for training, so a question looks like the records that it learned from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from clients.data import (
    Source,
    SourceName,
    breast_cancer_schema,
    constants_of,
    image_of,
    image_rules_of,
    schema_of,
    size_of,
)
from clients.places import place_of
from clients.tables import Category, Number, Schema, encode, parse_schema, read_cells
from models.task import Features, Task
from privacy.errors import DataError
from privacy.plan import is_number

IMAGES: Final = (".png", ".jpg", ".jpeg")
TABLES: Final = (".csv", ".parquet")
_MOST_PIXELS: Final = 1024


def preparation(task: Task, data: str) -> dict[str, Any]:
    """Returns how files become records of a task: public constants alone.

    Args:
        task: What is learned.
        data: Where its data lies; of it, only the schema or the rules of a folder of images are read.

    Raises:
        DataError: A schema is damaged.
    """
    if callable(task.data):
        return {"kind": "array"}
    if task.data in (SourceName.TABLE, SourceName.BREAST_CANCER):
        schema = breast_cancer_schema() if task.data == SourceName.BREAST_CANCER else schema_of(task, data)
        return {"kind": "table", "schema": schema_fields(schema)}
    if task.data == SourceName.DIGITS:
        return {"kind": "image", "mode": "L", "mean": [0.0], "deviation": [1.0]}
    if task.data == SourceName.IMAGE_FOLDER:
        mode = image_rules_of(task, data).mode
        channels = 3 if mode == "RGB" else 1
        return {"kind": "image", "mode": mode, "mean": [0.5] * channels, "deviation": [0.5] * channels}
    mean, deviation = constants_of(task)
    return {
        "kind": "image",
        "size": size_of(task),
        "mode": "RGB" if len(mean) == 3 else "L",
        "mean": list(mean),
        "deviation": list(deviation),
    }


def read_record(
    place: str, inputs: tuple[int, ...], prepare: Mapping[str, Any], features: Features | None = None
) -> Tensor:
    """Reads one record.

    Args:
        place: An image file; or a table's file and a row, counted from 0, as ``FILE:ROW``; or a ``.npy`` file.
        inputs: Shape of what the model gets.
        prepare: Of the published head.
        features: The fixed map that the task's records go through; an array is taken to have been through it.

    Returns:
        Shape ``(1, *inputs)``, float32, finite.

    Raises:
        DataError: It is not there, or is no record of this shape; one sentence.
    """
    kind = prepare.get("kind")
    path, row = _named(place)
    if path.suffix == ".npy":
        record = _array(path, inputs)
    elif kind == "image" and path.suffix.lower() in IMAGES:
        record = _image(path, inputs, prepare)
    elif kind == "table" and path.suffix.lower() in TABLES:
        record = _row(path, row, prepare)
    else:
        wanted = {"image": "an image (PNG or JPEG)", "table": "FILE.csv:ROW or FILE.parquet:ROW"}.get(str(kind), "")
        raise DataError(f"expected {wanted + ' or ' if wanted else ''}an array (.npy), got {place!r}; give such a file")
    if features is not None and path.suffix != ".npy":
        record = features(record)
    if tuple(record.shape) != (1, *inputs):
        raise DataError(f"expected a record of shape {inputs}, got {tuple(record.shape[1:])} from {place}")
    if not bool(record.isfinite().all()):
        raise DataError(f"expected finite numbers in {place}, got NaN or infinity; correct the record")
    return record


def _named(place: str) -> tuple[Path, int]:
    path, _, row = place.rpartition(":")
    if path and row.isdecimal() and not Path(place).exists():
        return Path(path).expanduser(), int(row)
    return Path(place).expanduser(), 0


def _array(path: Path, inputs: tuple[int, ...]) -> Tensor:
    try:
        # Never an object array: that would be unpickled.
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"expected an array in {path}, got {error}; save it with numpy.save") from None
    if found.size != math.prod(inputs) or found.dtype.kind not in "fiub":
        raise DataError(f"expected {inputs} numbers in {path}, got {found.dtype} of shape {found.shape}")
    return torch.from_numpy(found.astype(np.float32)).reshape(1, *inputs)


def _image(path: Path, inputs: tuple[int, ...], prepare: Mapping[str, Any]) -> Tensor:
    mode = prepare.get("mode")
    size = prepare.get("size", inputs[1] if len(inputs) == 3 and inputs[1] == inputs[2] else 0)
    # As untrusted as the rest of what a server publishes.
    if mode not in ("L", "RGB") or not isinstance(size, int) or not 1 <= size <= _MOST_PIXELS:
        raise DataError(f"expected a head for square images, got one for records of shape {inputs}")
    constants = [prepare.get(name) for name in ("mean", "deviation")]
    channels = 3 if mode == "RGB" else 1
    # More of them would make as many channels of an image as the server likes.
    if not all(
        isinstance(numbers, list | tuple) and len(numbers) == channels and all(map(is_number, numbers))
        for numbers in constants
    ):
        raise DataError("expected a mean and a deviation for each channel in the published head, got others")
    pixels = image_of(place_of(path), size, str(mode)) / 255  # (C, H, W)
    mean, deviation = (torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1) for numbers in constants)
    return ((pixels - mean) / deviation).unsqueeze(0)


def _row(path: Path, row: int, prepare: Mapping[str, Any]) -> Tensor:
    content = prepare.get("schema")
    schema = parse_schema(content if isinstance(content, dict) else {}, "the published head's schema")
    cells = dict(read_cells(place_of(path), schema))
    count = max(map(len, cells.values()), default=0)
    if not 0 <= row < count:
        raise DataError(f"expected a row below {count} in {path}, got {row}; rows are counted from 0")
    picked: dict[str, Any] = {name: [column[row]] for name, column in cells.items()}
    # Nobody knows the class yet; the model does not see the column.
    picked[schema.target] = [schema.classes[0]]
    if schema.client is not None:
        picked[schema.client] = ["nobody"]
    return encode(picked, schema, where=f"{path}, row {row}", strict=True).records.inputs


def schema_fields(schema: Schema) -> dict[str, Any]:
    """Returns a schema as `clients.tables.parse_schema` reads it; without counts, which no question needs."""
    columns: dict[str, Any] = {name: {"kind": "ignored"} for name in schema.ignored}
    for name, column in schema.columns.items():
        match column:
            case Number():
                fill = {} if column.missing is None else {"missing": column.missing}
                columns[name] = {"kind": "number", "min": column.low, "max": column.high} | fill
            case Category():
                columns[name] = {"kind": "category", "values": list(column.values), "other": column.other}
    named = {} if schema.client is None else {"client": schema.client}
    return {"target": schema.target, "classes": list(schema.classes), "columns": columns} | named


def public_record(source: Source, index: int) -> Tensor:
    """Returns one record of a public test set, shape ``(1, *inputs)``.

    Raises:
        DataError: There are not so many.
    """
    if not 0 <= index < len(source.test):
        raise DataError(f"expected an index below {len(source.test)} of the public test set, got {index}")
    return source.test.inputs[index : index + 1]
