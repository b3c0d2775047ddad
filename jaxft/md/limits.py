"""When a replica has left physics."""

from __future__ import annotations

from dataclasses import dataclass

NOT_FINITE, TOO_HOT, TOO_CLOSE = 1, 2, 3
"""Why the device ends a replica; 0 is none."""

HOST, PADDING = 98, 99
"""Reasons of replicas that the host ended, and of the graph that is none."""


@dataclass(frozen=True)
class Limits:
    """Beyond them a replica has exploded or collapsed."""

    temperature: float = 1e4
    """K; the criterion of MLIPAudit."""
    distance: float = 0.5
    """Least distance of two atoms, in units of the sum of their covalent radii."""

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not self.distance >= 0:
            raise ValueError(
                f"limits of {self.temperature} K and {self.distance} covalent radii are not "
                "possible; use positive ones (a distance of 0 is none)."
            )

    def describe(self, reason: int) -> str:
        """A reason of the device in words."""
        return {
            NOT_FINITE: "energy or forces are not finite",
            TOO_HOT: f"hotter than {self.temperature:g} K",
            TOO_CLOSE: (
                f"two atoms closer than {self.distance:g} of the sum of their covalent radii"
            ),
        }[reason]
