"""What was built for the machine with the GPU, as `manifest.json` beside it says."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

NAME = "manifest.json"


@dataclass
class Artifact:
    name: str
    kind: str  # "program", "wheel", "test", "bench", "library"
    path: str  # relative to the manifest, or absolute where it was left where it was built
    bytes: int
    sha256: str
    libraries: list[str]
    glibc: str | None
    glibcxx: str | None


@dataclass
class Manifest:
    commit: str
    changed: bool  # whether files differed from the commit
    versions: dict[str, str]
    shim: dict
    tracked_bytes: int
    artifacts: list[Artifact]
    folder: Path

    def write(self) -> None:
        facts = asdict(self)
        del facts["folder"]
        (self.folder / NAME).write_text(json.dumps(facts, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        facts = json.loads((folder / NAME).read_text())
        facts["artifacts"] = [Artifact(**artifact) for artifact in facts["artifacts"]]
        return cls(**facts, folder=folder.resolve())

    def path(self, name: str) -> Path:
        found = [artifact for artifact in self.artifacts if artifact.name == name]
        if not found:
            raise FileNotFoundError(f"{name} is not among the artefacts")
        return self.folder / found[0].path

    def damaged(self) -> list[str]:
        """Names of the artefacts that are not what was built."""
        return [one.name for one in self.artifacts if not self._is_whole(one)]

    def _is_whole(self, artifact: Artifact) -> bool:
        path = self.folder / artifact.path
        return path.is_file() and digest(path) == artifact.sha256


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
