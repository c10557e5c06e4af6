"""Layers by number, by share of the depth, and by name: what is written once fits models of any depth."""

import pytest
from helpers import tiny_model

import hf_compress as hfc
from hf_compress.distillation.layer_map import number_of, parse_pairs


def of_depth(number, family="bert"):
    return tiny_model(family, num_hidden_layers=number)


PAIRS = [
    ("skip", 1, 2, [(1, 2)]),
    ("skip", 2, 4, [(1, 2), (2, 4)]),
    ("skip", 3, 6, [(1, 2), (2, 4), (3, 6)]),
    ("uniform", 2, 5, [(1, 2), (2, 5)]),
    ("last", 2, 6, [(1, 5), (2, 6)]),
    ("1/3:1/3,2/3:2/3,last:last", 2, 2, [(1, 1), (2, 2)]),  # two thirds of 2 layers: 1.33, so the first
    ("1/3:1/3,2/3:2/3,last:last", 4, 4, [(1, 1), (3, 3), (4, 4)]),
    ("1/3:1/3,2/3:2/3,last:last", 6, 6, [(2, 2), (4, 4), (6, 6)]),
    ("1/3:1/3,2/3:2/3,last:last", 12, 12, [(4, 4), (8, 8), (12, 12)]),
    ("0.5:0.5, last:last", 2, 6, [(1, 3), (2, 6)]),
    ("0:0,1:2,last:6", 3, 6, [(0, 0), (1, 2), (3, 6)]),
    ("0.01:0.01", 3, 6, [(1, 1)]),  # never the embedding
]


@pytest.mark.parametrize("pairs, mine, theirs, expected", PAIRS, ids=[f"{p}-{m}-{t}" for p, m, t, _ in PAIRS])
def test_pairs_of_layers(pairs, mine, theirs, expected):
    assert parse_pairs(pairs, of_depth(mine), of_depth(theirs)) == expected


@pytest.mark.parametrize("pairs", ["half:1", "1/0:1", "3/2:1", "0.0:1", "1:2:3", "1", "", "-1/2:1", "1e-1:1"])
def test_what_is_no_layer_is_refused(pairs):
    with pytest.raises(ValueError, match="hints are pairs student:teacher"):
        parse_pairs(pairs, of_depth(2), of_depth(4))


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="points to hidden state 5 of the teacher, which has 0 .* to 4"):
        parse_pairs("1:5", of_depth(2), of_depth(4))
    with pytest.raises(ValueError, match="no deeper than its teacher"):
        parse_pairs("skip", of_depth(4), of_depth(2))


def test_shares_and_names_are_of_one_stack():
    model = tiny_model("bart")
    assert parse_pairs("1:1,3:3", model, model) == [(1, 1), (3, 3)]
    for pairs in ("skip", "1/2:1/2", "last:last"):
        with pytest.raises(ValueError, match="an encoder and a decoder"):
            parse_pairs(pairs, model, model)


def test_a_students_depth_may_be_a_share():
    assert [number_of(share, 12) for share in ("1/3", "0.5", "7", "last", " 2/3 ")] == [4, 6, 7, 12, 8]
    for depth, kept in ((2, 1), (4, 1), (6, 2), (12, 4)):
        student = hfc.make_student(of_depth(depth), num_hidden_layers="1/3")
        assert student.config.num_hidden_layers == kept
    both = hfc.make_student(tiny_model("bart", encoder_layers=4, decoder_layers=2), num_hidden_layers="1/2").config
    assert (both.encoder_layers, both.decoder_layers) == (2, 1)
    for wrong in ("third", "4/3", "1/0"):
        with pytest.raises(ValueError, match="Layers are a number, or a share"):
            hfc.make_student(of_depth(4), num_hidden_layers=wrong)
