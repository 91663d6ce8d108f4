"""The folder of a comparison: its plan and every finished (cache, document), so that a killed run can go on.

    plan.json                      the resolved config, written before anything is measured
    documents/<cache>/<n>.npz      per-token figures of document n
    result.json                    the summary, written when all is done

Every file is written under another name and renamed, so an existing file is always whole.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ..saving import whole_file
from .facts import write_json

PLAN, RESULT = "plan.json", "result.json"


class Store:
    """The finished parts of a comparison, in `folder` or, if that is None, in memory.

    Raises:
        ValueError: the folder was begun with another plan.
    """

    def __init__(self, folder: Path | None, plan: dict):
        self.folder = folder
        self._parts: dict[tuple[str, int], dict[str, np.ndarray]] = {}
        if folder is None:
            return
        plan = json.loads(json.dumps(plan))
        file = folder / PLAN
        if file.exists():
            before = json.loads(file.read_text(encoding="utf-8"))
            if before != plan:
                changes = "; ".join(_changes(before, plan))
                raise ValueError(
                    f"folder: {str(folder)!r} holds a comparison with other settings ({changes}); expected the same "
                    "ones, or another folder"
                )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(file, plan)

    def load(self, name: str, document: int) -> dict[str, np.ndarray] | None:
        """A finished part; None if there is none."""
        if (name, document) in self._parts:
            return self._parts[name, document]
        if self.folder is None or not document_file(self.folder, name, document).exists():
            return None
        with np.load(document_file(self.folder, name, document)) as arrays:
            part = dict(arrays)
        self._parts[name, document] = part
        return part

    def save(self, name: str, document: int, part: dict[str, np.ndarray]) -> None:
        self._parts[name, document] = part
        if self.folder is not None:
            file = document_file(self.folder, name, document)
            file.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(file) as temporary, temporary.open("wb") as stream:
                np.savez_compressed(stream, **part)  # type: ignore[arg-type]  # none is its own option

    def finish(self, result: dict) -> None:
        if self.folder is not None:
            write_json(self.folder / RESULT, result)


def document_file(folder: Path, name: str, document: int) -> Path:
    """The file of the finished part of one cache and document."""
    return folder / "documents" / name / f"{document}.npz"


def _changes(before: object, after: object, where: str = "") -> list[str]:
    """The differences, by the names of the innermost fields."""
    if isinstance(before, dict) and isinstance(after, dict):
        found = []
        for name in {**before, **after}:
            found += _changes(before.get(name), after.get(name), f"{where}.{name}" if where else name)
        return found
    return [] if before == after else [f"{where}: {before!r} became {after!r}"]
