"""What to say where a checkpoint is asked for and there is none. Imports neither torch nor Lightning."""

from __future__ import annotations

from pathlib import Path

NAMES = ("best.ckpt", "last.ckpt")


def no_checkpoint(path: Path) -> str:
    """The sentence for ``path``, which is no file: it names the checkpoints of the run that the path leads to."""
    folders = (path / "checkpoints", path) if path.is_dir() else (path.parent, path.parent / "checkpoints")
    found = [str(folder / name) for folder in folders for name in NAMES if (folder / name).is_file()]
    what = f"{path} is a folder, and no checkpoint file" if path.is_dir() else f"there is no checkpoint file at {path}"
    return what + (f"; there is {' and '.join(found)}" if found else "")
