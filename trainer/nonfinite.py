"""Steps without a finite gradient: how many in a row are borne, and what is said when a run ends for them."""

from collections.abc import Sequence

MAX_SKIPPED_IN_A_ROW = 20
"""So many steps without a finite gradient are no accident."""


def nonfinite_gradient(names: Sequence[str], step: int, num_before: int) -> FloatingPointError:
    """What ends a run whose state before `step` is saved.

    Args:
        names: parameters whose gradient is not finite; none where only their sum is not, since one of finite ones can overflow.
        step: the optimizer step, from 1.
        num_before: steps right before it that were skipped for the same.
    """
    shown = ", ".join(names[:3]) or "all parameters together"
    more = f" and of {len(names) - 3} more" if len(names) > 3 else ""
    before = f", nor was one in the {num_before} before it" if num_before else ""
    return FloatingPointError(
        f"the gradient of {shown}{more} is not finite in step {step}{before}; the state before it is saved: lower the learning "
        "rate, or continue with --engine.on_nonfinite skip"
    )
