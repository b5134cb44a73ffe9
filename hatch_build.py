"""The parts of the package's build that pyproject.toml cannot express."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface


class Requirements(MetadataHookInterface):
    """Reads the dependencies from requirements.txt, which `make app` and Spaces install from, and those of the extra
    `farm` from requirements-farm.txt."""

    def update(self, metadata: dict[str, Any]) -> None:
        metadata["dependencies"] = self.lines("requirements.txt")
        metadata["optional-dependencies"] = {"farm": self.lines("requirements-farm.txt")}

    def lines(self, name: str) -> list[str]:
        lines = (Path(self.root) / name).read_text("utf-8").splitlines()
        return [line for line in lines if line and not line.startswith("#")]


class Editable(BuildHookInterface):
    """Makes `pip install -e .` work: there the folder app/ keeps its name, so lightx2v_studio borrows its path."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            self.folder = tempfile.TemporaryDirectory()
            alias = Path(self.folder.name) / "__init__.py"
            alias.write_text("from app import __path__ as __path__\n", "utf-8")
            build_data["force_include_editable"] = {str(alias): "lightx2v_studio/__init__.py"}

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if version == "editable":
            self.folder.cleanup()
