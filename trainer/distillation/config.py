"""Configure distillation: the teacher, the loss and the cache of its logits."""

import dataclasses
import math
from pathlib import Path

from bitfleet.trainer.run.roles import role


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """Teacher whose predictions the network learns. The loss is label_weight times the
    cross-entropy with the labels plus (1 - label_weight) temperature^2 times the cross-entropy with
    the teacher's probabilities, both networks' logits divided by the temperature. The defaults are
    ReActNet's."""

    teacher: str = ""
    """Network in timm's registry, with as many classes as the run. "": train on the labels. It sees
    the student's images (crop, flip, data.mean, data.std), in eval mode, in fp32 on a CPU and in
    bf16 on a GPU; its logits are rounded to fp16."""
    weights: Path | None = None
    """Weights of the teacher, .safetensors. None: those that timm downloads for it."""
    temperature: float = 1.0
    """Divisor of the logits of both networks; more makes the teacher's probabilities softer."""
    label_weight: float = 0.0
    """Part of the loss that is the cross-entropy with the labels, in [0, 1)."""
    cache: Path | None = dataclasses.field(default=None, metadata=role("host"))
    """Folder that `bitfleet data teach` wrote the teacher's logits into, for this run and others;
    the run reads them and needs no teacher. It has the same bits as without (on a CPU with an equal
    num_threads), so a resumed run may change this."""

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"distill.temperature must be positive, not {self.temperature}")
        if not 0 <= self.label_weight < 1:
            raise ValueError(
                f"distill.label_weight must be in [0, 1), not {self.label_weight}: to train on the labels alone, "
                "leave distill.teacher out"
            )
        if not self.teacher:
            others = [field for field in dataclasses.fields(self) if field.name != "teacher"]
            if given := [field.name for field in others if getattr(self, field.name) != field.default]:
                raise ValueError(f"distill.{given[0]} needs a teacher: pass --distill.teacher with its name in timm")

    @property
    def soft_weight(self) -> float:
        """Factor of the cross-entropy with the teacher. Times temperature^2, its gradients keep
        their size (Hinton et al. 2015)."""
        return (1 - self.label_weight) * self.temperature**2

    @property
    def loss_scale(self) -> float:
        """Loss of a network that guesses, relative to log(number of classes)."""
        return self.label_weight + self.soft_weight if self.teacher else 1.0
