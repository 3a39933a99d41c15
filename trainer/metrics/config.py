"""How often a run reports, and what."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MetricsConfig:
    """How often a run reports."""

    every_steps: int = 10
    """Log every so many optimizer steps; on all other steps metrics cost no host sync."""
    diagnostics: bool = False
    """Log also what the flips of the binary weights amount to (docs/diagnostics.md); wants engine.sharding bits."""

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ValueError(f"metrics.every_steps must be at least 1, not {self.every_steps}")
