"""Labels at the ends of lines."""

from bitfleet.launch.report.drawing import End, label_ends, logarithmic, panels


def test_a_line_that_ends_at_0_is_labelled_at_the_border_of_a_logarithmic_axis() -> None:
    (axis,) = panels(1)
    axis.plot([0, 1, 2], [1e-2, 1e-3, 0.0])
    logarithmic(axis)
    low, _ = axis.get_ylim()
    label_ends(axis, [End(2.0, 0.0, "all", "#332288")])
    axis.get_figure().draw_without_rendering()  # a point at minus infinity would warn, and leave no room for the axes
    assert axis.texts[0].xy == (2.0, low)
