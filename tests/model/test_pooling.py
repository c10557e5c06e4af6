"""Pooling: each mode by hand, and folders of sentence-transformers read and written."""

import json

import pytest
import torch

from hf_compress.model.pooling import MODES, Pooling, read_pooling, write_pooling

STATES = torch.tensor([[[1.0, 8.0], [3.0, 2.0], [5.0, -9.0]], [[7.0, 7.0], [2.0, 4.0], [6.0, 0.0]]])
RIGHT, LEFT = torch.tensor([[1, 1, 0], [1, 1, 1]]), torch.tensor([[0, 1, 1], [1, 1, 1]])


@pytest.mark.parametrize("mode, mask, expected", [
    ("mean", RIGHT, [[2.0, 5.0], [5.0, 11 / 3]]),
    ("mean", LEFT, [[4.0, -3.5], [5.0, 11 / 3]]),
    ("cls", RIGHT, [[1.0, 8.0], [7.0, 7.0]]),
    ("cls", LEFT, [[3.0, 2.0], [7.0, 7.0]]),
    ("lasttoken", RIGHT, [[3.0, 2.0], [6.0, 0.0]]),
    ("lasttoken", LEFT, [[5.0, -9.0], [6.0, 0.0]]),
    ("max", RIGHT, [[3.0, 8.0], [7.0, 7.0]]),
])  # fmt: skip
def test_each_mode_by_hand_padded_on_either_side(mode, mask, expected):
    torch.testing.assert_close(Pooling(mode)(STATES, mask), torch.tensor(expected))
    torch.testing.assert_close(Pooling(mode)(STATES, None), Pooling(mode)(STATES, torch.ones(2, 3)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("normalize", [False, True])
def test_what_is_written_is_read(mode, normalize, tmp_path):
    write_pooling(tmp_path, Pooling(mode, normalize), 8)
    assert read_pooling(tmp_path) == Pooling(mode, normalize)


def test_a_folder_of_a_newer_version_is_read(tmp_path):
    (tmp_path / "1_Pooling").mkdir()
    kinds = ("base.modules.transformer.Transformer", "sentence_transformer.modules.pooling.Pooling")
    steps = [{"idx": i, "path": path, "type": f"sentence_transformers.{kind}"}
             for i, (path, kind) in enumerate(zip(("", "1_Pooling"), kinds, strict=True))]  # fmt: skip
    (tmp_path / "modules.json").write_text(json.dumps(steps), encoding="utf-8")
    (tmp_path / "1_Pooling" / "config.json").write_text(
        '{"embedding_dimension": 8, "pooling_mode": "cls"}', encoding="utf-8"
    )
    assert read_pooling(tmp_path) == Pooling("cls", normalize=False)


def test_what_cannot_be_read_is_refused(tmp_path):
    assert read_pooling(tmp_path) is None
    write_pooling(tmp_path, Pooling(), 8, torch.eye(8))
    with pytest.raises(ValueError, match="'Dense', 'Normalize'.*expected Transformer and Pooling"):
        read_pooling(tmp_path)
    write_pooling(tmp_path, Pooling(), 8)
    listed = tmp_path / "modules.json"
    listed.write_text(listed.read_text(encoding="utf-8").replace("1_Pooling", "../elsewhere"), encoding="utf-8")
    with pytest.raises(ValueError, match="'../elsewhere', which is not inside"):
        read_pooling(tmp_path)
    write_pooling(tmp_path, Pooling(), 8)
    config = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="joins the poolings"):
        read_pooling(tmp_path)
    with pytest.raises(ValueError, match="pooling must be one of .* got 'sum'"):
        Pooling("sum")
