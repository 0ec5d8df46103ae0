"""Text data sets: groups of phrases, windows of roles, and what bad files look like to a simulation and a holder."""

import gzip
import os
import urllib.request
import zipfile
from pathlib import Path

import pytest
import torch

from clients.data import load_source
from clients.records import Records, faults, sanitize
from clients.text import group_phrases
from models.catalog import TASKS
from models.language import ALPHABET, LENGTH, WINDOWS, Characters
from models.words import PHRASES, SENTENCES, words_of
from privacy.errors import DataError

SST2, PLAYS = TASKS["sst2-embedding"], TASKS["shakespeare-lstm"]
TRAIN = (
    "label\tsentence\r\n1\ta fine , moving film\r\n0\tdull and lifeless from start to end\r\n1\tmoving\r\n0\tdull\r\n"
)
DEV = "label\tcontent\r\n0\tno movement\r\n1\tvery fine\r\n"


def real(*names):
    """The place of a real data set, or a reason to skip."""
    folder = Path(os.environ.get("TACIT_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
    found = next((folder / name for name in names if (folder / name).exists()), None)
    if found is None:
        pytest.skip(f"needs {names[0]} in {folder} (TACIT_DATA chooses another place)")
    return found


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.tsv").write_bytes(TRAIN.encode())
    (tmp_path / "dev.tsv").write_bytes(DEV.encode())
    return tmp_path


def play(roles=("ROMEO", "JULIET"), least=10_000):
    """A play in which every role speaks at least so many characters, and a bystander does not."""
    speeches = []
    for turn in range(least // 40 + 1):
        speeches += [f"{role}:\nThus have I spoken {turn:05d} times to thee.".replace("0", "o") for role in roles]
    text = "\n\n".join([*speeches, "Guard:\nWho is there?"]) + "\n"
    return "".join(letter if letter in ALPHABET else "x" for letter in text)


def test_a_group_is_a_sentence_with_every_phrase_that_it_contains():
    phrases = ["b c", "a b c d", "c d e f g", "c", "x", "b c", "d e"]
    assert group_phrases(phrases) == [[2, 6, 3], [1, 0, 5], [4]]
    # Contained means word for word: "ab" is no part of "a b" or "cab".
    assert group_phrases(["cab d", "ab", "a b"]) == [[0], [2], [1]]


def test_every_phrase_is_in_one_group_whatever_the_phrases_are():
    generator = torch.Generator().manual_seed(0)
    phrases = [
        " ".join("abcd"[int(k)] for k in torch.randint(4, (int(n),), generator=generator))
        for n in torch.randint(1, 9, (300,), generator=generator)
    ]
    groups = group_phrases(phrases)
    assert sorted(index for group in groups for index in group) == list(range(300))
    for group in groups:
        sentence = f" {phrases[group[0]]} "
        assert all(f" {phrases[index]} " in sentence for index in group)


def test_g1_a_sentence_with_its_phrases_is_one_record(folder):
    source = load_source(SST2, data=str(folder))
    assert source.shape == SENTENCES
    assert len(source.train) == 2
    assert source.train.targets[:, :2].tolist() == [[0, 0], [1, 1]]
    assert source.train.inputs[0, 1, :1].tolist() == words_of("dull")
    assert source.train.valid.all()
    assert source.test.targets[:, 0].tolist() == [0, 1]
    assert not faults(source.train, SENTENCES)


def test_glues_own_columns_and_a_zip_say_the_same(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "SST-2.zip", "w") as archive:
        swapped = ["\t".join(reversed(line.split("\t"))) for line in TRAIN.replace("\r", "").split("\n")]
        archive.writestr("SST-2/train.tsv", "\n".join(swapped))
        archive.writestr("SST-2/dev.tsv", DEV.replace("content", "sentence"))
        archive.writestr("SST-2/original/raw/train.tsv", "nothing of use")
    one, other = load_source(SST2, data=str(folder)), load_source(SST2, data=str(tmp_path / "SST-2.zip"))
    assert torch.equal(one.train.inputs, other.train.inputs)
    assert torch.equal(one.train.targets, other.train.targets)
    assert torch.equal(one.test.inputs, other.test.inputs)


@pytest.mark.parametrize("line", ["1\t  ", "2\tfine", "1", "1\tfine\tvery", "\tfine"])
def test_a_bad_row_is_an_error_in_a_simulation_and_an_invalid_record_at_a_holder(folder, line):
    (folder / "train.tsv").write_text(TRAIN + line + "\n")
    with pytest.raises(DataError, match=r"train\.tsv line 6"):
        load_source(SST2, data=str(folder))
    (folder / "dev.tsv").unlink()
    held = load_source(SST2, data=str(folder), strict=False)
    assert held.train.valid.tolist() == [True, True, False]
    assert len(held.test) == 0


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train.tsv", "index\tsentence\n0\tfine\n", "columns sentence and label"),
        ("train.tsv", None, "expected train.tsv"),
        ("dev.tsv", None, "expected dev.tsv"),
    ],
)
def test_files_that_are_no_sst2_are_named(folder, name, content, words):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(DataError, match=words):
        load_source(SST2, data=str(folder))


def test_a_broken_zip_and_a_missing_place_are_clear_errors(tmp_path, monkeypatch):
    (tmp_path / "sst2.zip").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(DataError, match="zip archive"):
        load_source(SST2, data=str(tmp_path / "sst2.zip"))
    with pytest.raises(DataError, match="found neither"):
        load_source(SST2, data=str(tmp_path / "nowhere"))

    def offline(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setenv("TACIT_DATA", str(tmp_path / "empty"))
    for task in (SST2, PLAYS):
        with pytest.raises(DataError, match="download"):
            load_source(task)
    assert not (tmp_path / "empty").exists()


def test_windows_of_a_role_share_no_character_and_are_that_roles_own(tmp_path):
    text = play()
    (tmp_path / "play.txt.gz").write_bytes(gzip.compress(text.encode()))
    source = load_source(PLAYS, data=str(tmp_path / "play.txt.gz"))
    assert source.shape == WINDOWS
    assert source.key_names == ("ROMEO", "JULIET")
    assert not faults(source.train, WINDOWS)
    codec = Characters()
    for number in range(2):
        mine = source.train.take((source.keys == number).nonzero()[:, 0])
        pieces = [codec.decode([*x.tolist(), int(y[-1])]) for x, y in zip(mine.inputs, mine.targets, strict=True)]
        spoken = "\n".join(
            part.split("\n", 1)[1] for part in text.split("\n\n") if part.startswith(source.key_names[number])
        )
        joined = "".join(pieces)
        assert spoken.startswith(joined)
        assert len(spoken) * 0.9 - (LENGTH + 1) < len(joined) <= len(spoken) * 0.9
        assert torch.equal(mine.inputs[:, 1:], mine.targets[:, :-1])


def test_a_strange_character_is_an_error_in_a_simulation_and_costs_a_holder_its_window(tmp_path):
    path = tmp_path / "play.txt"
    path.write_text(play().replace("spoken ooo", "spok\u00e9n oo", 1))
    with pytest.raises(DataError, match="'é'"):
        load_source(PLAYS, data=str(path))
    held = load_source(PLAYS, data=str(path), strict=False)
    assert (~held.train.valid).sum() == 1


@pytest.mark.parametrize("content", [b"", b"no speeches here", b"\x1f\x8b broken", b"\xff\xfe\x00"])
def test_a_text_without_roles_is_a_clear_error(tmp_path, content):
    (tmp_path / "play.txt").write_bytes(content)
    with pytest.raises(DataError, match="expected"):
        load_source(PLAYS, data=str(tmp_path / "play.txt"))


def test_sequences_with_strange_tokens_are_named_and_cleaned():
    inputs, targets = torch.zeros((4, *WINDOWS.inputs), dtype=torch.int64), torch.zeros((4, LENGTH), dtype=torch.int64)
    inputs[1, 5], inputs[2, 0], targets[3, 63] = WINDOWS.tokens, -1, WINDOWS.classes
    records = Records(inputs, targets, torch.ones(4, dtype=torch.bool))
    words = " ".join(faults(records, WINDOWS))
    assert "2 records (first: index 1)" in words
    assert "1 record (first: index 3)" in words
    clean = sanitize(records, WINDOWS)
    assert clean.valid.tolist() == [True, False, False, False]
    assert not clean.inputs.any()
    assert not faults(Records(clean.inputs, clean.targets, torch.ones(4, dtype=torch.bool)), WINDOWS)
    for broken in (
        Records(inputs.float(), targets, records.valid),
        Records(inputs, targets[:, 0], records.valid),
        Records(inputs[:, :5], targets, records.valid),
    ):
        assert faults(broken, WINDOWS)
        assert sanitize(broken, WINDOWS).inputs.dtype == torch.int64
        assert sanitize(broken, WINDOWS).targets.shape == (4, LENGTH)
    assert len(sanitize(Records.blank(WINDOWS, 0), WINDOWS)) == 0


def test_real_sst2_is_6886_groups_of_at_most_twelve_phrases():
    source = load_source(SST2, data=str(real("sst2.zip")))
    assert (len(source.train), len(source.test)) == (6886, 872)
    assert source.train.inputs.shape[1] == PHRASES
    assert source.declared_records >= len(source.train)


def test_real_shakespeare_is_36_roles():
    source = load_source(PLAYS, data=str(real("tinyshakespeare.txt.gz", "tinyshakespeare.txt")))
    assert len(source.key_names) == 36
    assert source.declared_records == len(source.train)
