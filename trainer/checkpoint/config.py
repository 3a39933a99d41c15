"""Options of checkpoints."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When to save, and which checkpoints to keep."""

    every_epochs: int = 1
    """Save every N epochs, and at the end."""
    every_steps: int | None = None
    """Also save every N steps. None: not by steps."""
    every_minutes: float | None = 15.0
    """Also save every N minutes. None: not by time."""
    keep_last: int = 2
    """Keep the N newest checkpoints."""
    keep_every_steps: int | None = None
    """Never delete checkpoints whose step is a multiple of this. None: no such exception."""
    keep_best: bool = True
    """Keep the checkpoint with the best validation top-1."""

    def __post_init__(self) -> None:
        for name in ("every_epochs", "every_steps", "keep_last", "keep_every_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{name} must be at least 1, not {value}")
        if self.every_minutes is not None and not self.every_minutes > 0:
            raise ValueError(f"checkpoint.every_minutes must be positive, not {self.every_minutes}")
