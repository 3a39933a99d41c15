"""Merge operations of a program: maps into the operation before, signs into comparisons of sums.

An operation that ends in floats has places for steps, in the order of `PLACES`; a map after it goes
into the first places behind those that are taken, if they fit. Signs after maps of sums become
comparisons of integers, whose thresholds are found by evaluating the maps as torch does, so they
are exact.
"""

from collections.abc import Sequence

import numpy as np

from bitfleet.packed.program import Array, Buffer, Flag, Kind, Operation, Type

ALWAYS = 1 << 30
"""A threshold beyond every sum of products."""
PLACES: tuple[tuple[str, str | Flag], ...] = (
    ("relu", Flag.RELU_FIRST),
    ("factor", "factor"),
    ("offset", "offset"),
    ("add", "other"),
    ("offset", "shift"),
    ("relu", Flag.RELU),
    ("slope", "slope"),
    ("offset", "after"),
)
"""Steps at the end of an operation, in order, and the fields or flags that hold them."""
ADDERS = {Kind.CONV, Kind.BINARY_CONV, Kind.DEPTHWISE, Kind.AFFINE}
FINISHERS = ADDERS | {Kind.ADD, Kind.LAYER_NORM, Kind.SCALE}
"""Kinds that have the steps; the others of them cannot add."""


def fuse(operations: list[Operation]) -> list[Operation]:
    """Merge operations into the ones whose only readers they are, in the order of the operators."""
    fused: list[Operation] = []
    for operation in operations:
        maker = _maker(fused, operation.source)
        producer = maker if _readers(operations, operation.source) == 1 else None
        if operation.kind is Kind.AFFINE and producer is not None and _take_steps(producer, operation):
            producer.target = operation.target
        elif operation.kind is Kind.ADD and (adder := _adder(operations, fused, operation)) is not None:
            adder.other = operation.other if adder.target is operation.source else operation.source
            adder.target = operation.target
            fused.remove(adder)  # after what it adds
            fused.append(adder)
        elif operation.kind is Kind.SIGN and producer is not None and _is_map_of_sums(producer):
            _compare_sums(producer, operation.target)
        elif operation.kind is Kind.SIGN:
            if producer is not None and _is_shift(producer):
                fused.remove(producer)
                operation.source, operation.offset = producer.source, producer.offset
                maker = _maker(fused, operation.source)
            if maker is not None and maker.signs is None:
                maker.signs, maker.sign_shift = operation.target, operation.offset
            else:
                fused.append(operation)
        else:
            fused.append(operation)
    return fused


def _maker(fused: Sequence[Operation], buffer: Buffer) -> Operation | None:
    return next((o for o in fused if o.target is buffer), None)


def _readers(operations: Sequence[Operation], buffer: Buffer) -> int:
    return sum((o.source is buffer) + (o.other is buffer) for o in operations)


def _holds(operation: Operation, place: str | Flag) -> bool:
    return place in operation.flags if isinstance(place, Flag) else getattr(operation, place) is not None


def _next_place(operation: Operation) -> int:
    """Return the place behind the last one that is taken."""
    if operation.kind is Kind.SCALE:  # whose `other` is no step
        return max((i + 1 for i, (step, at) in enumerate(PLACES) if step != "add" and _holds(operation, at)), default=0)
    return max((i + 1 for i, (_, at) in enumerate(PLACES) if _holds(operation, at)), default=0)


def _take_steps(producer: Operation, after: Operation) -> bool:
    """Give the steps of a map to the operation before it, or return False."""
    if producer.kind not in FINISHERS or producer.signs is not None or after.other is not None:
        return False
    place, moves = _next_place(producer), []
    for step, source in PLACES:
        if not _holds(after, source):
            continue
        while place < len(PLACES) and PLACES[place][0] != step:
            place += 1
        if place == len(PLACES):
            return False
        moves.append((source, PLACES[place][1]))
        place += 1
    for source, target in moves:
        if isinstance(target, Flag):
            producer.flags |= target
        else:
            assert isinstance(source, str)
            setattr(producer, target, getattr(after, source))
    return True


def _adder(operations: Sequence[Operation], fused: Sequence[Operation], add: Operation) -> Operation | None:
    """Return the operation that can add by itself: the later of the two that it adds."""
    added = next(place for place, (step, _) in enumerate(PLACES) if step == "add")
    for operation in reversed(fused):
        if operation.target is add.source or operation.target is add.other:
            can = operation.kind in ADDERS and operation.signs is None and _next_place(operation) <= added
            if can and _readers(operations, operation.target) == 1:
                return operation
    return None


def _is_shift(operation: Operation) -> bool:
    """Return True for a map of floats that only adds an offset."""
    steps = [at for _, at in PLACES if _holds(operation, at)]
    return operation.kind is Kind.AFFINE and operation.source.type is Type.FLOATS and steps == ["offset"]


def _is_map_of_sums(operation: Operation) -> bool:
    """Return True if its signs are comparisons of sums: no step but a factor turns their order."""
    if operation.other is not None or (operation.slope is not None and (operation.slope < 0).any()):
        return False
    return operation.kind is Kind.BINARY_CONV or (operation.kind is Kind.AFFINE and operation.source.type is Type.SUMS)


def _compare_sums(producer: Operation, target: Buffer) -> None:
    """Make the operation that ends in floats of sums end in their signs."""
    producer.factor, producer.offset = thresholds(producer)
    producer.shift = producer.slope = producer.after = None
    producer.target, producer.flags = target, producer.flags & Flag.PAD_ONES
    if producer.kind is Kind.AFFINE:
        producer.kind = Kind.THRESHOLD


def thresholds(operation: Operation) -> tuple[Array, Array]:
    """Return thresholds t and directions d, int32: the sign of what the steps of an operation make
    of a sum is +1 exactly where sum * d >= t.

    Rounding is monotonic, so bisection over the integers finds t as float32 arithmetic has it.
    """
    size, factor = operation.target.channels, operation.factor
    direction = np.ones(size, np.int32) if factor is None else np.where(factor < 0, -1, 1).astype(np.int32)

    def is_positive(product: Array) -> Array:
        return np.asarray(~(_finished(operation, (product * direction).astype(np.float32)) < 0))

    low, high = np.full(size, -(1 << 24), np.int64), np.full(size, 1 << 24, np.int64)  # sums of products are in between
    always, never = is_positive(low), ~is_positive(high)
    while (high - low > 1).any():
        middle = (low + high) // 2
        positive = is_positive(middle)
        high, low = np.where(positive, middle, high), np.where(positive, low, middle)
    result = np.where(always, -ALWAYS, np.where(never, ALWAYS, high))
    return result.astype(np.int32), direction


def _finished(operation: Operation, values: Array) -> Array:
    """Return float32 values after the steps of an operation, each rounded."""
    for step, place in PLACES:
        if not _holds(operation, place):
            continue
        weight = None if isinstance(place, Flag) else getattr(operation, place).astype(np.float32)
        if step == "factor":
            values = values * weight
        elif step == "offset":
            values = values + weight
        else:
            assert step in ("relu", "slope")
            values = np.where(values < 0, np.float32(0) if weight is None else values * weight, values)
    return values
