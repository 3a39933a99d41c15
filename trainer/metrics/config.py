"""Settings of a run's reports."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MetricsConfig:
    """Settings of a run's reports."""

    every_steps: int = 10
    """Log every N optimizer steps; on all other steps metrics cost no host sync."""
    diagnostics: bool = False
    """Also log diagnostics of the flips of binary weights (docs/diagnostics.md); needs
    engine.sharding bits."""

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ValueError(f"metrics.every_steps must be at least 1, not {self.every_steps}")
