"""The settings of the commands for a trained adapter: inspect, generate, chat, merge, export."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import UserError
from .options import option, setting


def require(settings: object, name: str, ok: bool, allowed: str) -> None:
    """Raise a UserError that names the option, its value and what is allowed, unless ``ok``."""
    if not ok:
        raise UserError(f"{option(name)} is {getattr(settings, name)}; it must be {allowed}")


@dataclass
class InspectSettings:
    """The options of ``peftkern inspect``."""

    all: bool = setting(False, "Every layer and tensor.", flag="--all")
    json: bool = setting(False, "As JSON, with every layer.", flag="--json")
    max_rank: int | None = setting(None, "The rank that the server is started for (512).")

    def validate(self) -> None:
        """Raise a UserError for the first option with an impossible value."""
        ok = self.max_rank is None or self.max_rank >= 1
        require(self, "max_rank", ok, "at least 1")
