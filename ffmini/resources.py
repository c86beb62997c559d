"""Where the files that are not Python lie: inside the package when installed, beside it in a checkout."""

from __future__ import annotations

from pathlib import Path

from .errors import FFMiniError


def resource_dir(name: str) -> Path:
    """The directory `name` ("cuda" or "models"); FFMiniError if the installation lost it."""
    package = Path(__file__).resolve().parent
    for parent in (package, package.parent):
        if (parent / name).is_dir():
            return parent / name
    raise FFMiniError(
        f"{name}/ is missing from the installation: expected {package / name}; reinstall ffmini"
    )
