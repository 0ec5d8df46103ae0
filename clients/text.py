"""Text as records: sentence groups of SST-2, and windows of Shakespeare's roles.

Files are looked for in their standard layout at the path given, or under `clients.data.data_folder`, and fetched from
their official address where they are in neither and the machine can. A zip is read in place (`clients.places`).
"""

from __future__ import annotations

import gzip
import urllib.request
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Final, cast

import torch

from clients.data import Source, SourceName, data_folder
from clients.places import Place, entries_of, place_of, stream_of
from clients.records import Records
from models import gpt2
from models.language import ALPHABET, LENGTH, WINDOWS, Characters
from models.shape import Shape
from models.task import Codec
from models.words import SENTENCES, group_record
from privacy.errors import DataError
from privacy.files import write_whole

_CONNECT_S: Final = 20.0
# Far more than any of these data sets has; a small archive can unpack to gigabytes.
_MOST_BYTES: Final = 2**27

_SST2: Final = "https://dl.fbaipublicfiles.com/glue/data/SST-2.zip"
# "6,920 sentences" to train on (Socher et al. 2013); a count of somebody's own records would not be public.
_SST2_SENTENCES: Final = 6920

_SHAKESPEARE: Final = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
_LEAST_SPOKEN: Final = 10_000
# In the published text, whose 36 such roles anybody can count.
_SHAKESPEARE_WINDOWS: Final = 8369
_MOST_TESTS: Final = 64


def sst2(data: str | None, strict: bool) -> Source:
    """Returns SST-2 as sentence groups: GLUE's ``train.tsv`` and ``dev.tsv``, in a folder or a zip.

    Args:
        data: The folder or zip; by default ``sst2``, ``SST-2`` or one of their zips in the data folder, or a download.
        strict: Whether a bad row is an error, or a record that is marked invalid (a data holder's, guarantee G12).

    Raises:
        DataError: The files are missing, are not what they should be, or, if strict, hold a bad row.
    """
    place = _located(data, ("sst2", "SST-2", "sst2.zip", "SST-2.zip"), _SST2, "SST-2.zip")
    rows = _rows(place, "train.tsv", strict)
    phrases = [row for row in rows if row is not None]
    groups = group_phrases([text for text, _ in phrases])
    records = [group_record([phrases[index] for index in group]) for group in groups]
    bad = Records.blank(SENTENCES, len(rows) - len(phrases))
    train = Records(
        torch.cat([torch.stack([inputs for inputs, _ in records]), bad.inputs]) if records else bad.inputs,
        torch.cat([torch.stack([targets for _, targets in records]), bad.targets]) if records else bad.targets,
        torch.cat([torch.ones(len(records), dtype=torch.bool), bad.valid]),
    )
    # The test set is the server's and public, so a bad row in it is an error for everybody; a holder needs none.
    sentences = _rows(place, "dev.tsv", strict=True, needed=strict)
    tests = [group_record([row]) for row in sentences if row is not None]
    test = Records.blank(SENTENCES, 0)
    if tests:
        test = Records(
            torch.stack([inputs for inputs, _ in tests]),
            torch.stack([targets for _, targets in tests]),
            torch.ones(len(tests), dtype=torch.bool),
        )
    return Source(
        name=SourceName.SST2,
        shape=SENTENCES,
        train=train,
        test=test,
        declared_records=_SST2_SENTENCES,
        classes=("negative", "positive"),
    )


def shakespeare(name: SourceName, data: str | None, strict: bool) -> Source:
    """Returns plays as windows of tokens, one natural client for each role of at least 10,000 characters.

    A role's speeches are joined in their order, a line break between two. The first 90 % are cut into windows to train
    on, the last 10 % into the public test set; windows share no token, and what is left over at either end of a part is
    left out.

    Args:
        name: SHAKESPEARE for windows of characters; SHAKESPEARE_GPT2 for windows of the tokens of a local GPT-2, of
            whose test windows at most `_MOST_TESTS` are kept, evenly spaced: each needs a logit for 50,257 tokens at
            every place.
        data: The text, plain or gzipped; by default ``tinyshakespeare.txt(.gz)`` or ``input.txt`` in the data folder,
            or a download.
        strict: Whether text without tokens is an error, or marks its window invalid (a data holder's).

    Raises:
        DataError: The text is missing, has no such role, or, if strict, holds an unknown character; or there is no
            whole GPT-2.
    """
    by_character = name is SourceName.SHAKESPEARE
    shape, _ = _plays(name)
    place = _located(
        data, ("tinyshakespeare.txt.gz", "tinyshakespeare.txt", "input.txt"), _SHAKESPEARE, "tinyshakespeare.txt"
    )
    roles = {
        role: spoken for role, spoken in _speeches(_text_of(place, strict)).items() if len(spoken) >= _LEAST_SPOKEN
    }
    if not roles:
        raise DataError(
            f"expected speeches under lines 'NAME:' at {place}, with a role of {_LEAST_SPOKEN} characters; found none"
        )
    codec: Codec = Characters() if by_character else gpt2.BytePairs()
    trains, tests, keys = [], [], []
    for number, spoken in enumerate(roles.values()):
        edge = len(spoken) * 9 // 10
        trains.append(_windows(spoken[:edge], codec, shape, strict))
        tests.append(_windows(spoken[edge:], codec, shape, strict=True))
        keys += [number] * len(trains[-1])
    test = _joined(tests)
    if not by_character and len(test) > _MOST_TESTS:
        test = test.take(torch.arange(_MOST_TESTS) * len(test) // _MOST_TESTS)
    return Source(
        name=name,
        shape=shape,
        train=_joined(trains),
        test=test,
        declared_records=_plays(name)[1],
        keys=torch.tensor(keys, dtype=torch.int64),
        key_names=tuple(roles),
        classes=tuple(ALPHABET) if by_character else tuple(map(str, range(shape.classes))),
    )


def _plays(name: SourceName) -> tuple[Shape, int]:
    """Returns what is public about windows of plays: their shape, and how many the published text has."""
    if name is SourceName.SHAKESPEARE:
        return WINDOWS, _SHAKESPEARE_WINDOWS
    try:
        shape = gpt2.shape_of(gpt2.folder())
    except ValueError as error:
        raise DataError(str(error)) from error
    # GPT-2 needs a token for three of the published text's characters.
    return shape, _SHAKESPEARE_WINDOWS * (LENGTH + 1) // (3 * (shape.inputs[0] + 1))


def published(name: SourceName) -> tuple[Shape, int]:
    """Returns what is public about a text data set, without reading it: its shape, and its number of records.

    Raises:
        DataError: The shape is that of a local GPT-2, and there is no whole one.
    """
    return (SENTENCES, _SST2_SENTENCES) if name is SourceName.SST2 else _plays(name)


def _speeches(text: str) -> dict[str, str]:
    """Returns what each role says, in the order in which the roles first speak."""
    found: dict[str, list[str]] = {}
    for speech in text.replace("\r\n", "\n").split("\n\n"):
        name, _, words = speech.strip("\n").partition("\n")
        if name.endswith(":") and words:
            found.setdefault(name[:-1], []).append(words)
    return {name: "\n".join(speeches) for name, speeches in found.items()}


def _windows(text: str, codec: Codec, shape: Shape, strict: bool) -> Records:
    """Cuts a text into windows of one token more than a record has places, which share none."""
    step = shape.inputs[0] + 1
    # A character is a token, whatever it is, so that a strange one costs its own window and moves no other.
    pieces: list[str] | list[list[int]]
    if isinstance(codec, Characters):
        pieces = [text[start : start + step] for start in range(0, len(text) - step + 1, step)]
    else:
        tokens = codec.encode(text)
        pieces = [tokens[start : start + step] for start in range(0, len(tokens) - step + 1, step)]
    records = Records.blank(shape, len(pieces))
    for index, piece in enumerate(pieces):
        try:
            window = torch.tensor(codec.encode(piece) if isinstance(piece, str) else piece)
        except ValueError as error:
            if strict:
                raise DataError(f"{error}, in {piece[:30]!r}; replace it") from error
            continue
        records.inputs[index], records.targets[index], records.valid[index] = window[:-1], window[1:], True
    return records


def _joined(parts: Sequence[Records]) -> Records:
    return Records(
        torch.cat([part.inputs for part in parts]),
        torch.cat([part.targets for part in parts]),
        torch.cat([part.valid for part in parts]),
    )


def _text_of(place: Place, strict: bool) -> str:
    """The text of a file, gzipped or not."""
    try:
        with stream_of(place) as stream:
            packed = stream.peek(2)[:2] == b"\x1f\x8b"
            content = _bounded(cast(IO[bytes], gzip.GzipFile(fileobj=stream) if packed else stream), str(place))
        return content.decode("utf-8", "strict" if strict else "replace")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(
            f"expected a text in UTF-8 at {place}, plain or gzipped, got {error}; fetch it again"
        ) from error


def group_phrases(phrases: Sequence[str]) -> list[list[int]]:
    """Groups phrases by the sentence that contains them, word for word.

    The longest phrase that is in no group yet (the first of equal ones) is a sentence; every phrase that it contains
    and that is in no group yet joins it. So a phrase of several sentences belongs to the longest of them.

    Guarantees:
        Exact: every phrase is in exactly one group; the same phrases in the same order give the same groups.

    Args:
        phrases: Words separated by single spaces; a phrase may occur several times.

    Returns:
        Positions in ``phrases``: each group's sentence first, then its other phrases, longer before shorter.
    """
    where: dict[str, list[int]] = {}
    begun: set[str] = set()
    for index, phrase in enumerate(phrases):
        if phrase not in where:
            # Every beginning of a phrase, so that a search stops where no phrase goes on like this.
            begun.update(phrase[:at] for at, letter in enumerate(phrase) if letter == " ")
            begun.add(phrase)
        where.setdefault(phrase, []).append(index)
    owner: dict[str, int] = {}
    groups: list[list[int]] = []
    for sentence in sorted(where, key=lambda phrase: (-phrase.count(" "), where[phrase][0])):
        if sentence in owner:
            groups[owner[sentence]] += where[sentence]
            continue
        number = owner[sentence] = len(groups)
        groups.append(list(where[sentence]))
        starts = [0, *(at + 1 for at, letter in enumerate(sentence) if letter == " ")]
        ends = [*(start - 1 for start in starts[1:]), len(sentence)]
        for first, start in enumerate(starts):
            for end in ends[first:]:
                part = sentence[start:end]
                if part not in begun:
                    break
                if part in where and part not in owner:
                    owner[part] = number
    return groups


def _rows(place: Place, name: str, strict: bool, needed: bool = True) -> list[tuple[str, int] | None]:
    """Reads (sentence, label) rows of a file with a header; None for a bad row. No rows where it need not be there."""
    content = _member(place, name)
    if content is None:
        if needed:
            raise DataError(f"expected {name} in {place}, found none; put GLUE's SST-2 files there")
        return []
    try:
        lines = content.decode("utf-8", "strict" if strict else "replace").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: expected {name} in UTF-8, got {error}; convert it") from error
    header = lines[0].rstrip("\r").split("\t")
    text_column = next((word for word in ("sentence", "content") if word in header), None)
    if text_column is None or "label" not in header:
        raise DataError(
            f"{place}: expected the columns sentence and label in the first line of {name}, got {header[:4]}; "
            "GLUE's file of sentences without labels (test.tsv) is no training data"
        )
    at, label_at = header.index(text_column), header.index("label")
    rows: list[tuple[str, int] | None] = []
    for number, line in enumerate(lines[1:], start=2):
        cells = line.rstrip("\r").split("\t")
        if cells == [""]:
            continue
        text = " ".join(cells[at].split()) if len(cells) == len(header) else ""
        sound = bool(text) and cells[label_at] in ("0", "1")
        if strict and not sound:
            raise DataError(
                f"{name} line {number}: expected a sentence and a label 0 or 1, got {line[:60]!r}; mend or drop it"
            )
        rows.append((text, int(cells[label_at])) if sound else None)
    return rows


def _located(data: str | None, names: Sequence[str], address: str, saved: str) -> Place:
    """Where a data set lies: the path that was given, or one of its names in the data folder, or what is downloaded."""
    if data:
        given = Path(data).expanduser()
        for path in (given, data_folder() / given):
            if path.exists():
                return place_of(path)
        raise DataError(f"expected data at {given} or {data_folder() / given}, found neither; check data=PATH")
    for name in names:
        if (data_folder() / name).exists():
            return place_of(data_folder() / name)
    target = data_folder() / saved
    try:
        # One of this module's own https addresses, never one that somebody gave.
        with urllib.request.urlopen(address, timeout=_CONNECT_S) as answer:  # noqa: S310
            content = answer.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise DataError(
            f"expected {' or '.join(names)} in {data_folder()}, found none, and the download of {address} failed "
            f"({type(error).__name__}: {error}); put it there, or name its place with data=PATH"
        ) from error
    if len(content) > _MOST_BYTES:
        raise DataError(f"expected at most {_MOST_BYTES} bytes at {address}, got more; put the file there by hand")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, content)
    return place_of(target)


def _member(place: Place, name: str) -> bytes | None:
    """The bytes of a file in a folder, or in a folder in it; None where there is none."""
    try:
        folders = [place, *(entry for entry in entries_of(place) if entry.is_dir())] if place.is_dir() else []
        found = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if found is None:
            return None
        with stream_of(found) as stream:
            return _bounded(stream, str(found))
    except OSError as error:
        raise DataError(f"expected to read {name} in {place}, got {error}; mend its permissions") from error


def _bounded(stream: IO[bytes], words: str) -> bytes:
    """Everything in a stream of a sane size."""
    content = stream.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise DataError(f"{words}: expected at most {_MOST_BYTES} bytes, got more; split or shrink it")
    return content
