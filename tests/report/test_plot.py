"""Names stand where they can be read."""

import io
import random
from itertools import combinations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from hf_compress.measuring.measurement import Measurement
from hf_compress.measuring.timing import Spread
from hf_compress.report.plot import _extents, _label_points, _points, trade_off_png
from hf_compress.report.report import Report
from hf_compress.report.result import Entry, Interval

ONE = Spread.of([1.0])


def made_up_report(num_models, seed=0):
    chance = random.Random(seed)
    entries = []
    for i in range(num_models):
        speed_up = 1.0 if i == 0 else chance.uniform(0.9, 9)
        interval = Interval(speed_up, 0.97 * speed_up, 1.03 * speed_up)
        size_bytes = 90_900_000 if i == 0 else int(chance.uniform(3e6, 9e7))
        cost = Measurement(22_700_000, size_bytes, 32.0, {"weights": 0.0}, 10**9, ONE, ONE, 10**8, 128, "float32",
                           "a processor", 2, {"torch": "2"})  # fmt: skip
        quality = chance.gauss(0.96, 0.01)
        seeds = (quality, quality + 0.004, quality - 0.004) if i in (1, 2) else (quality,)
        entries.append(Entry(f"student {i}", "Model", False, None, seeds, None, cost, 1.0, 1.0, interval, interval))
    return Report("student 0", tuple(entries), "accuracy", "made up", 100, "python x.py")


@pytest.mark.parametrize("seed", range(6))
def test_no_name_covers_a_point_a_bar_or_another_name(seed):
    chance = random.Random(seed)
    figure = Figure(figsize=(5, 4.6), dpi=160)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    xs, ys = [chance.uniform(5, 90) for _ in range(7)], [chance.gauss(96, 1) for _ in range(7)]
    xs[1], ys[1] = xs[0], ys[0]  # a model beside itself
    _points(axes, xs, ys, [0.0, 0.3, 0.4, 0, 0, 0, 0], [(1.0, 1.0)] * 7)
    axes.set(xlim=(0, 110), ylim=(min(ys) - 1, max(ys) + 1))
    canvas.draw()
    names = _label_points(axes, [f"student {i}" for i in range(7)])
    assert not any(one.overlaps(other) for one, other in combinations(names, 2))
    drawn = [box for container in axes.containers for box in _extents(axes, container, canvas.get_renderer())]
    assert not any(name.overlaps(box) for name in names for box in drawn)
    inside = axes.get_window_extent()
    assert all(inside.x0 <= name.x0 and name.x1 <= inside.x1 for name in names)


@pytest.mark.parametrize("num_models", [1, 3, 10])
def test_the_picture_is_a_png_of_one_size(num_models):
    with Image.open(io.BytesIO(trade_off_png(made_up_report(num_models)))) as image:
        assert (image.format, image.size) == ("PNG", (1600, 736))
        assert len(image.getcolors(maxcolors=10**6)) > 10  # not blank
