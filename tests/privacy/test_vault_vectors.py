"""The vault's vectors: files that another path made open to their content, and each of the faulty ones is refused."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from privacy.errors import VaultError
from privacy.vault import container
from privacy.vault.archive import unpacked
from privacy.vault.container import BLOCK, Header, Wanted, open_bytes, seal_bytes
from privacy.vault.keys import Keyring, Opener, Passphrase, RecoveryKey, RecoveryRecipient

PLACE = Path(__file__).parents[1] / "vectors" / "vault.json"
VECTORS: dict[str, Any] = json.loads(PLACE.read_text(encoding="utf-8"))
KEYS: list[Opener] = [Keyring._import(VECTORS["keyring"]), Passphrase(VECTORS["passphrase"])]


def maker() -> ModuleType:
    specification = importlib.util.spec_from_file_location("make_vault", PLACE.with_name("make_vault.py"))
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def dense(entry: dict[str, Any]) -> bytes:
    out = bytearray(entry["length"])
    for at, text in entry["bytes"]:
        out[at : at + len(text) // 2] = bytes.fromhex(text)
    return bytes(out)


@pytest.mark.parametrize("name", list(VECTORS["good"]))
def test_a_file_that_another_path_made_opens_to_its_content(name: str) -> None:
    entry = VECTORS["good"][name]
    content = open_bytes(dense(entry), KEYS, Wanted(purpose="checkpoint", run="run-7", generation=3))
    assert len(content) == entry["content_bytes"]
    assert hashlib.sha256(content).hexdigest() == entry["content_sha256"]


def test_a_folder_that_another_path_made_has_its_files() -> None:
    content = open_bytes(dense(VECTORS["good"]["folder"]), KEYS, Wanted())
    files = {name: hashlib.sha256(part).hexdigest() for name, part in unpacked(content).items()}
    assert files == VECTORS["folder"]


@pytest.mark.parametrize("name", list(VECTORS["bad"]))
def test_a_file_with_one_fault_is_refused(name: str, tmp_path: Path) -> None:
    data = dense(VECTORS["bad"][name])
    with pytest.raises(VaultError):
        open_bytes(data, KEYS, Wanted())
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(VaultError):
        container.read_file(tmp_path / "a", KEYS, Wanted())


def test_the_vectors_are_what_the_other_path_makes() -> None:
    assert maker().vectors() == VECTORS


def test_the_other_path_imports_nothing_of_ours() -> None:
    text = PLACE.with_name("make_vault.py").read_text()
    assert not any(f"import {room}" in text or f"from {room}" in text for room in ("privacy", "tacit", "clients"))


def test_the_header_block_is_the_same_byte_for_byte() -> None:
    header = Header(**VECTORS["header"])
    assert header.block() == dense(VECTORS["good"]["short"])[:BLOCK] == maker().block_of()


def test_a_recovery_key_has_the_public_half_that_the_other_path_computed() -> None:
    """HPKE draws its own coins, so a recovery wrap has no fixed bytes; the keys and what they open do."""
    key = RecoveryKey._import(VECTORS["recovery"])
    assert key.recipient.to_text() == VECTORS["recovery_public"]
    sealed = seal_bytes(Header(purpose="data"), [RecoveryRecipient.parse(VECTORS["recovery_public"])], b"x")
    assert open_bytes(sealed, [key], Wanted()) == b"x"


# A check that is taken out, and vectors that it alone refuses.
_GUARDS = [
    ("_object", ["header with a space", "header padding not zero", "slot with a space", "header key twice"]),
    ("own", ["slot MAC flipped", "slot MAC missing"]),
    (
        "bounds",
        ["Argon2id lanes above the bound", "Argon2id passes above the bound", "Argon2id passes below the bound"],
    ),
    ("suite", ["format 2", "suite 2", "format 0", "suite 0"]),
]


@pytest.mark.parametrize(("guard", "names"), _GUARDS)
def test_planted_bugs_are_found_by_the_vectors_alone(
    guard: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything else about these files is right: without the one check they open."""

    def loose(text: bytes, length: int) -> object:
        try:
            return json.loads(text[:length])
        except ValueError:
            return None

    match guard:
        case "_object":
            monkeypatch.setattr(container, "_object", loose)
        case "own":
            monkeypatch.setattr(container._Keys, "own", lambda keys, slot: True)
        case "bounds":
            monkeypatch.setattr(container.Wrap.parse.__globals__["Stretch"], "__post_init__", lambda self: None)
        case _:
            monkeypatch.setattr(container, "FORMAT", 0)
            monkeypatch.setattr(container, "_PREFIX", _AnySuite())
    for name in names:
        assert open_bytes(dense(VECTORS["bad"][name]), KEYS, Wanted()) == b"the weights of clinic 7"


class _AnySuite:
    """Reads a prefix and believes it, whatever format and suite it says."""

    size = container._PREFIX.size

    @staticmethod
    def unpack_from(block: bytes) -> tuple[bytes, int, int, int]:
        magic, _, _, length = _PREFIX.unpack_from(block)
        return magic, 0, 1, length


_PREFIX = container._PREFIX
