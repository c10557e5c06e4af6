"""Schedules against their formulas, worked out by hand."""

import pytest

from hf_compress.pruning.schedules import Cubic, Fixed, OneShot, TwoSlopes, make_schedule


def make(kind="cubic", sparsity=0.8, begin=0.1, end=0.6, num_updates=5, max_steps=100, **options):
    return make_schedule(kind, sparsity, begin=begin, end=end, num_updates=num_updates, max_steps=max_steps, **options)


def test_cubic_follows_equation_7():
    schedule = make()
    assert schedule == Cubic(0.8, begin=10, frequency=10, num_updates=5)
    for i in range(5 + 1):  # s_f + (s_0 - s_f) (1 - i / (n f))^3 with s_0 = 0, s_f = 0.8, n f = 50
        assert schedule.level(10 + 10 * i) == pytest.approx(0.8 - 0.8 * (1 - 10 * i / 50) ** 3)
    assert schedule.level(3) == 0 and schedule.level(99) == pytest.approx(0.8)
    assert [step for step in range(101) if schedule.updates_at(step)] == [10, 20, 30, 40, 50, 60]


def test_cubic_ends_exactly_where_it_should_when_steps_do_not_divide():
    schedule = make(begin=0.0, end=0.97, num_updates=10)
    assert schedule.end == 97 and schedule.updates_at(97) and schedule.level(97) == pytest.approx(0.8)


def test_more_updates_than_steps_are_one_a_step():
    schedule = make(max_steps=10, begin=0.0, end=0.5, num_updates=100)
    assert (schedule.frequency, schedule.num_updates) == (1, 5)


def test_one_shot_prunes_once():
    schedule = make("one-shot", begin=0.25)
    assert schedule == OneShot(0.8, 25)
    assert [step for step in range(101) if schedule.updates_at(step)] == [25]
    assert make("one-shot", begin=0.0, first_step=1).begin == 1


def test_two_slopes_follow_equations_4_to_6():
    schedule = TwoSlopes(0.9, begin=10, ramp=20, end=40, frequency=5)
    s, r, e, f = 10, 20, 40, 5
    theta = 2 * f / (2 * (r - s) + 3 * (e - r))  # = 10 / 80
    assert theta == 0.125
    assert schedule.level(9) == 0
    assert schedule.level(15) == pytest.approx(theta * 6 / f)
    assert schedule.level(20) == pytest.approx(theta * 11 / f)
    assert schedule.level(30) == pytest.approx((theta * 11 + 1.5 * theta * 11) / f)
    assert schedule.level(40) == pytest.approx((theta * 11 + 1.5 * theta * 21) / f)
    assert schedule.level(40) == pytest.approx(1.0, abs=0.07), "the threshold ends near q"


def test_slopes_of_blocks_are_steeper_by_the_fourth_root_of_their_elements():
    weights = make("two-slopes", begin=0.1, end=0.6)
    blocks = make("two-slopes", begin=0.1, end=0.6, num_elements=16 * 16)
    for step in (12, 35, 60):
        assert blocks.level(step) == pytest.approx(4 * weights.level(step))


def test_a_fixed_threshold_is_the_same_at_each_update():
    schedule = make("fixed")
    assert schedule == Fixed(begin=10, end=60, frequency=10)
    assert [step for step in range(101) if schedule.updates_at(step)] == [10, 20, 30, 40, 50, 60]
    assert [schedule.level(step) for step in (9, 10, 35, 60, 99)] == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert make("fixed", num_elements=16).level(10) == 2.0  # as that of two slopes: the fourth root


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(begin=0.6, end=0.2), r"ends before it starts: begin=0.6, end=0.2"),
        (dict(begin=0.5, end=0.5), "ends before it starts"),
        (dict(max_steps=1, first_step=1), "ends before it starts: after step 1 of 1"),
        (dict(kind="one-shot", max_steps=0, first_step=1), "training has only 0 steps"),
        (dict(sparsity=1.0), "at least 0 and below 1, got 1.0"),
        (dict(sparsity=-0.1), "at least 0 and below 1"),
        (dict(begin=-0.1), "between 0 and 1"),
        (dict(num_updates=0), "num_updates must be at least 1"),
        (dict(kind="linear"), "schedule must be one of cubic, one-shot, two-slopes, fixed, got 'linear'"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:16],
)
def test_schedules_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
