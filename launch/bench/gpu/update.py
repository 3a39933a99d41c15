"""Part "update" of `bitfleet bench gpu`: nanoseconds a weight and GB/s of the update, against fused AdamW and a copy."""

from bitfleet.launch.bench.gpu.session import Session
from bitfleet.launch.bench.step import SIZES, bench_step
from bitfleet.optim.kernels.kernels import on_gpu

NEEDED_SECONDS = 15.0
"""For a size; the first one also compiles."""


def measure_update(session: Session) -> None:
    """Write down the contenders of `bitfleet bench step` on the device, the larger size first."""
    sizes, num_rounds = ((6400,), 1) if session.tiny else (sorted(SIZES, reverse=True), 11)
    for numel in sizes:
        session.attempt(f"{numel:,} weights", _measure, session, numel, num_rounds, needs_seconds=NEEDED_SECONDS)


def _measure(session: Session, numel: int, num_rounds: int) -> None:
    weights_per_turn = 0 if session.tiny else 50_000_000
    rows = bench_step([numel], num_rounds, session.device, weights_per_turn=weights_per_turn, with_deepspeed=False)
    for row in rows:
        session.add(
            row.name,
            numel=numel,
            ns_per_weight=row.ns_per_weight,
            bytes_per_weight=row.bytes_per_weight,
            GB_per_second=row.bytes_per_weight / row.ns_per_weight,
            time_to_adamw=row.ratio,
            of_copy_bandwidth=row.copy_fraction,
        )
    if session.is_cuda:
        session.add("kernel on bits", runs_in="Triton" if on_gpu(lambda triton: None) else "eager torch, the fallback")
