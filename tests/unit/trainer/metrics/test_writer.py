"""The diagnostics of bits in metrics.jsonl and TensorBoard."""

from pathlib import Path
from typing import Any

import pytest

from bitfleet.optim.diagnostics import LOWEST, NUM_BINS, octave_edges
from bitfleet.trainer.metrics import MetricsWriter, read_metrics


def test_diagnostics_reach_both_files(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2

    counts = [0] * NUM_BINS
    counts[-LOWEST - 3], counts[-LOWEST] = 30, 10  # 1/8 <= |r| < 1/4, 1 <= |r| < 2
    values: dict[str, Any] = {
        "since": 0,
        "flip_ratio": 0.25,
        "flip_ratio/a.weight": 0.5,
        "dead_band": 0.125,
        "log_ratio": {"edges": octave_edges(), "counts": counts},
    }
    log = MetricsWriter(tmp_path, 0)
    for step in (5, 10):
        log.write_diagnostics(step, values)
    log.close()
    assert read_metrics(tmp_path) == [{"kind": "diagnostics", "step": step, **values} for step in (5, 10)]

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert sorted(tags["scalars"]) == ["diagnostics/dead_band", "diagnostics/flip_ratio", "flip_ratio/a.weight"]
    assert [(event.step, event.value) for event in events.Scalars("flip_ratio/a.weight")] == [(5, 0.5), (10, 0.5)]
    *_, last = events.Histograms("diagnostics/log_ratio")
    histogram = last.histogram_value
    assert (histogram.num, histogram.min) == (40, octave_edges()[-LOWEST - 3])
    by_limit = dict(zip(histogram.bucket_limit, histogram.bucket, strict=True))
    assert by_limit[octave_edges()[-LOWEST - 2]] == 30
    assert by_limit[octave_edges()[-LOWEST + 1]] == 10
    (layout,) = events.Tensors("custom_scalars__config__")
    shown = layout_pb2.Layout.FromString(layout.tensor_proto.string_val[0])
    assert [chart.title for chart in shown.category[0].chart][:2] == ["flip_ratio", "dead_band"]
    assert list(shown.category[0].chart[0].multiline.tag) == ["flip_ratio/.*"]


def test_metrics_that_are_not_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind": "\xff"}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged: it is not text at byte 10"):
        read_metrics(tmp_path)
