"""A replay as a folder of plain files: raw numbers and JSON, nothing that could run code."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offtrace.modules.replay.entries import DTYPES, Key

_FORMAT = 2
_CHUNK = 1 << 24  # bytes
_FACTS = "replay.json"


class DamagedReplay(RuntimeError):
    """A replay's folder is not there, incomplete or altered; the message names what is wrong."""


def write_folder(
    path: Path,
    *,
    data: Mapping[Key, Tensor],
    filled: np.ndarray,
    books: Mapping[str, np.ndarray],
    facts: Mapping[str, Any],
) -> None:
    """Writes a replay; an older replay of that name is replaced once the new one is complete.

    Args:
        path: the folder.
        data: tensors ``[rings, size, ...]``.
        filled: ``[rings]``, slots of each that hold something.
        books: arrays of bookkeeping.
        facts: what JSON can hold.

    Raises:
        ValueError: something else than a replay has that name.
    """
    if path.exists() and not (path / _FACTS).is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{str(path)!r} is there and holds no replay; it would be lost: give another folder")
    new, old = (path.with_name(path.name + end) for end in (".new", ".old"))
    shutil.rmtree(new, ignore_errors=True)
    try:
        _write_new(new, data, filled, books, facts)
    except BaseException:  # on a full disk what is written takes the room of all else
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.rename(path, old)
    os.rename(new, path)
    shutil.rmtree(old, ignore_errors=True)


def _write_new(
    new: Path,
    data: Mapping[Key, Tensor],
    filled: np.ndarray,
    books: Mapping[str, np.ndarray],
    facts: Mapping[str, Any],
) -> None:
    new.mkdir(parents=True)
    entries = []
    for number, (key, tensor) in enumerate(data.items()):
        chunks = (tensor[ring, : int(count)] for ring, count in enumerate(filled))
        name, dtype = f"data{number}.bin", str(tensor.dtype).removeprefix("torch.")
        entry = {"key": key, "file": name, "dtype": dtype, "shape": list(tensor.shape[2:])}
        entries.append({**entry, **_write(new / name, map(_raw, chunks))})
    arrays = {}
    for name, array in books.items():
        file = f"{name}.bin"
        entry = {"file": file, "dtype": str(array.dtype), "shape": list(array.shape)}
        arrays[name] = {**entry, **_write(new / file, iter([np.ascontiguousarray(array).reshape(-1).view(np.uint8)]))}
    text = json.dumps(
        {"format": _FORMAT, "filled": filled.tolist(), "data": entries, "books": arrays, "facts": dict(facts)}
    )
    # the sum stands before the text it is of
    (new / _FACTS).write_text(f"{zlib.crc32(text.encode()):08x}\n{text}\n")


def reserve(folder: Path) -> None:
    """Takes the space of memory-mapped files: on a full disk, writing into a hole would kill the process.

    Raises:
        OSError: there is not enough.
    """
    if hasattr(os, "posix_fallocate"):  # not on macOS
        for file in folder.rglob("*.memmap"):
            with open(file, "r+b") as opened:
                os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)


class Folder:
    """A folder that was read and found whole."""

    def __init__(self, path: Path, described: dict[str, Any]) -> None:
        self.path = path
        self.filled: list[int] = described["filled"]
        self.facts: dict[str, Any] = described["facts"]
        self._data = described["data"]
        self.books: dict[str, np.ndarray] = {}
        for name, entry in described["books"].items():
            array = np.fromfile(path / entry["file"], dtype=np.dtype(entry["dtype"]))
            self.books[name] = array.reshape(entry["shape"])

    def leaves(self) -> dict[Key, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of one slot of each tensor."""
        return {tuple(x["key"]): (tuple(x["shape"]), DTYPES[x["dtype"]]) for x in self._data}

    def fill(self, data: Mapping[Key, Tensor]) -> None:
        """Copies the numbers into tensors ``[rings, size, ...]``."""
        for entry in self._data:
            tensor = data[tuple(entry["key"])]
            with open(self.path / entry["file"], "rb") as file:
                for ring, count in enumerate(self.filled):
                    target = tensor[ring, :count]
                    if not target.numel():  # such an array has no stride that a view could have
                        continue
                    raw = np.fromfile(file, np.uint8, target.numel() * target.element_size())
                    target.copy_(torch.from_numpy(raw).view(target.dtype).view(target.shape))


def read_folder(path: Path) -> Folder:
    """Reads the description of a replay and checks that every file is as it was written.

    Raises:
        DamagedReplay: it is not.
    """
    old = path.with_name(path.name + ".old")
    if not path.exists() and old.exists():
        path = old  # the writer was stopped between its two renames
    described = _describe(path)
    for entry in [*described["data"], *described["books"].values()]:
        file = path / entry["file"]
        try:
            size, checksum = file.stat().st_size, _checksum(file)
        except OSError as error:
            raise DamagedReplay(f"the replay in {str(path)!r} is damaged: {entry['file']}: {error.strerror}") from error
        if size != entry["bytes"]:
            raise DamagedReplay(
                f"the replay in {str(path)!r} is damaged: {entry['file']} has {size} bytes instead of {entry['bytes']}"
            )
        if checksum != entry["crc32"]:
            raise DamagedReplay(f"the replay in {str(path)!r} is damaged: the content of {entry['file']} was altered")
    return Folder(path, described)


def _describe(path: Path) -> dict[str, Any]:
    try:
        checksum, _, text = (path / "replay.json").read_text().partition("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedReplay(f"there is no replay in {str(path)!r}: replay.json cannot be read") from error
    text = text.rstrip("\n")
    if checksum != f"{zlib.crc32(text.encode()):08x}":
        raise DamagedReplay(f"the replay in {str(path)!r} is damaged: the content of replay.json was altered")
    described: dict[str, Any] = json.loads(text)
    if described["format"] != _FORMAT:
        raise DamagedReplay(
            f"the replay in {str(path)!r} has format {described['format']}; this version reads {_FORMAT} alone"
        )
    return described


def _raw(tensor: Tensor) -> np.ndarray:
    raw: np.ndarray = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return raw


def _write(file: Path, chunks: Iterator[np.ndarray]) -> dict[str, int]:
    checksum = size = 0
    with open(file, "wb") as out:
        for chunk in chunks:
            checksum = zlib.crc32(chunk.data, checksum)
            size += chunk.nbytes
            out.write(chunk.data)
    return {"bytes": size, "crc32": checksum}


def _checksum(file: Path) -> int:
    checksum = 0
    with open(file, "rb") as source:
        while chunk := source.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
