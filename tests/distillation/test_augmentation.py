"""Copies of texts have words replaced by what a masked language model expects, or by near word vectors."""

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from helpers import tiny_model
from transformers import BertTokenizerFast

import hf_compress as hfc
from hf_compress.distillation.texts import augmentation
from hf_compress.distillation.texts.proposals import MaskedWords, ModelNeighbours, Neighbours, Vocabulary, find_words

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "film",
    "good",
    "bad",
    "play",
    "##ing",
    "##er",
    ",",
    "!",
    "7",
]
TEXTS = ["A good film,  playing bad!", "bad player", "film 7 film, film good bad a film play", "good", "play film good"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    extra = [a + b for a in "bcdfghk" for b in "eiouy"]
    file.write_text(
        "\n".join([*WORDS, *extra, *(f"##{w}" for w in extra[: 64 - len(WORDS) - len(extra)])]), encoding="utf-8"
    )
    return BertTokenizerFast(str(file), model_max_length=64)


def dataset():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"]), "n": Value("int64")})
    return Dataset.from_dict({"text": TEXTS, "label": [1, 0, 0, 1, 1], "n": list(range(5))}, features=features)


def augment(tokenizer, **options):
    return hfc.augment(dataset(), tokenizer, **{"word_vectors": tiny_model("bert"), "copies": 30, **options})


def test_nearest_words_by_hand():
    neighbours = Neighbours(["king", "queen", "car", "King"], torch.tensor([[1, 0.1], [1, 0.3], [0, 1], [1, 0.1]]))
    assert neighbours.candidates(["king", "car", "KING", "unknown"], 2) == {
        "king": ["queen", "car"],
        "car": ["queen", "king"],
        "KING": ["queen", "car"],
    }


def test_a_word_of_one_token_knows_its_place_and_one_of_several_does_not(tokenizer):
    ids, words = find_words(tokenizer, TEXTS[:1])
    assert [TEXTS[0][w.start : w.end] for w in words[0]] == ["A", "good", "film", "playing", "bad"]
    assert [w.position for w in words[0]] == [1, 2, 3, None, 7]
    assert ids[0][7] == WORDS.index("bad")


def test_whole_words_are_tokens_that_stand_alone(tokenizer):
    words = Vocabulary(tokenizer).words
    assert words[WORDS.index("film")] == "film" and "be" in words.values()
    assert not {WORDS.index(w) for w in ("[CLS]", "##ing", ",", "7")} & words.keys()


def test_a_word_of_several_pieces_has_the_mean_of_their_embeddings(tokenizer):
    model = tiny_model("bert")
    neighbours = ModelNeighbours(model, Vocabulary(tokenizer))
    weight = model.get_input_embeddings().weight.detach()
    own = (weight[WORDS.index("play")] + weight[WORDS.index("##ing")]) / 2
    similarity = {
        word: torch.cosine_similarity(own, weight[i], dim=0).item() for i, word in Vocabulary(tokenizer).words.items()
    }
    expected = sorted(similarity, key=similarity.get, reverse=True)[:4]
    assert neighbours.candidates(["playing"], 4) == {"playing": expected}


def test_what_a_mean_says_nothing_of_stays(tokenizer):
    """A sentence without spaces, such as a Chinese one, is a run of letters; an unknown word is any."""
    neighbours = ModelNeighbours(tiny_model("bert"), Vocabulary(tokenizer))
    run = "play" + "ing" * 4  # five pieces
    assert len(Vocabulary(tokenizer).pieces([run])[0]) == 5 and Vocabulary(tokenizer).pieces(["\u7535"])[0] == [1]
    assert set(neighbours.candidates([run, "\u7535", "playing"], 4)) == {"playing"}
    rows = Dataset.from_dict({"text": [run, "\u7535 \u5f71"]})
    assert hfc.augment(rows, tokenizer, word_vectors=tiny_model("bert"), copies=5)["text"][:] == rows["text"][:]


def test_masked_words_are_the_most_probable_ones_of_the_whole_model(tokenizer):
    model = tiny_model("bert", "mlm").train()
    words = Vocabulary(tokenizer).words
    input_ids, _ = find_words(tokenizer, TEXTS)
    found = MaskedWords(model, Vocabulary(tokenizer), batch_size=2).candidates(input_ids, [(0, 2), (1, 1), (2, 3)], 5)
    assert model.training
    model.eval()
    for (text, position), candidates in found.items():
        masked = torch.tensor([input_ids[text]])
        masked[0, position] = tokenizer.mask_token_id
        logits = model(masked).logits[0, position]
        ranked = [i for i in logits.argsort(descending=True).tolist() if i in words and i != input_ids[text][position]]
        assert candidates == [words[i] for i in ranked[:5]]


@pytest.mark.parametrize("source", ["embeddings", "masked-lm"])
def test_rows_come_first_and_copies_differ_in_words_alone(source, tokenizer):
    options = {} if source == "embeddings" else {"word_vectors": None, "masked_lm": tiny_model("bert", "mlm")}
    data = augment(tokenizer, num_candidates=3, **options)
    whole = {w.lower() for w in Vocabulary(tokenizer).words.values()}
    for number in range(5):
        rows = data.filter(lambda row, n=number: row["original_row"] == n)
        assert rows[0]["text"] == TEXTS[number] and rows["is_augmented"][:] == [False] + [True] * (len(rows) - 1)
        assert 2 <= len(rows) <= 31 and len(set(rows["text"])) == len(rows)
        assert set(rows["label"]) == {dataset()[number]["label"]} and set(rows["n"]) == {number}
    copies = data.filter(lambda row: row["original_row"] == 0 and row["is_augmented"])["text"]
    for text in copies:
        words = text.removesuffix("!").replace(",  ", " ").split(" ")
        assert text.endswith("!") and ",  " in text and len(words) == 5
        assert text[0].isupper() and all(new.lower() in {*whole, "playing"} for new in words)
    changed = [[n != o for n, o in zip(t.split(" "), copies[0].split(" "), strict=True)] for t in copies]
    assert any(row[4] for row in changed)  # `playing`, of two pieces, is replaced too
    assert data.features["label"] == dataset().features["label"]


def test_as_many_words_are_replaced_as_the_probability_says(tokenizer):
    rows = Dataset.from_dict({"text": [" ".join(["film"] * 400)]})
    data = hfc.augment(rows, tokenizer, word_vectors=tiny_model("bert"), copies=5, probability=0.3)
    shares = [sum(w != "film" for w in text.split()) / 400 for text in data["text"][1:]]
    assert len(shares) == 5 and all(0.2 < share < 0.4 for share in shares)  # 4 standard deviations


def test_frequent_words_can_stay(tokenizer):
    data = augment(tokenizer, keep_frequent=1).filter(lambda row: row["original_row"] == 2)  # `film`, six times in all
    assert len(data) > 10 and all(text.startswith("film 7 film, film ") for text in data["text"])


def test_same_seed_same_copies_however_the_work_is_cut(tokenizer, tmp_path, monkeypatch):
    whole = augment(tokenizer)
    assert augment(tokenizer, seed=1)["text"][:] != whole["text"][:]
    monkeypatch.setattr(augmentation, "ROWS_PER_SHARD", 2)
    assert augment(tokenizer, num_workers=2).to_list() == whole.to_list()
    assert augment(tokenizer, path=tmp_path / "data").to_list() == whole.to_list()


def test_a_stopped_run_goes_on_and_other_settings_are_refused(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(augmentation, "ROWS_PER_SHARD", 2)
    whole = augment(tokenizer, path=tmp_path).to_list()
    first, last = tmp_path / "part-00000.arrow", tmp_path / "part-00002.arrow"
    made, again = first.stat().st_mtime_ns, last.stat().st_mtime_ns
    last.unlink()
    assert augment(tokenizer, path=tmp_path).to_list() == whole
    assert first.stat().st_mtime_ns == made and last.stat().st_mtime_ns > again
    with pytest.raises(ValueError, match="other settings: copies was 30, now 3. Choose another folder"):
        augment(tokenizer, path=tmp_path, copies=3)
    with pytest.raises(ValueError, match="other settings: word_vectors was"):
        augment(tokenizer, path=tmp_path, word_vectors=tiny_model("bert", seed=1))


def test_vectors_from_a_file(tokenizer, tmp_path):
    file = tmp_path / "glove.txt"
    file.write_text("good 1 0\nfine 0.9 0.1\nbad -1 0\nfilm 0 1\n", encoding="utf-8")
    data = augment(tokenizer, word_vectors=file, num_candidates=1)
    assert set(data.filter(lambda row: row["original_row"] == 3)["text"]) == {"good", "fine"}
    file.write_text("good 1 0\nfine 0.9\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: expected a word and 2 numbers, got 'fine 0.9'"):
        augment(tokenizer, word_vectors=file)


@pytest.mark.parametrize("texts, copied", [
    (["good film", "bad play"], True),
    (["playing player", "filmer"], True),
    (["7, 7!", ","], False),
    ([" ", ""], False),
    (["film", "7"], True),
], ids=["words of one token", "words of several", "no words", "nothing", "one word"])  # fmt: skip
@pytest.mark.parametrize("source", ["masked-lm", "embeddings", "both"])
def test_texts_with_words_of_one_kind_alone(texts, copied, source, tokenizer):
    models = {"masked_lm": tiny_model("bert", "mlm"), "word_vectors": tiny_model("bert")}
    chosen = {"masked-lm": ["masked_lm"], "embeddings": ["word_vectors"], "both": list(models)}[source]
    rows = Dataset.from_dict({"text": texts})
    data = hfc.augment(rows, tokenizer, copies=5, **{name: models[name] for name in chosen})
    assert [row["text"] for row in data if not row["is_augmented"]] == texts
    assert any(data["is_augmented"]) == copied


def test_a_tokenizer_without_whole_words_copies_what_word_vectors_know(tmp_path):
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join([*WORDS[:5], ",", "7", *(f"##{letter}" for letter in "abdfgilmo")]), encoding="utf-8")
    bare = BertTokenizerFast(str(file), model_max_length=64)
    assert not Vocabulary(bare).words
    model = tiny_model("bert", "mlm")
    assert len(hfc.augment(dataset(), bare, masked_lm=model, copies=3)) == len(TEXTS)


def test_the_two_texts_of_a_pair_are_replaced_together(tokenizer):
    pairs = Dataset.from_dict({"text": TEXTS, "text_pair": TEXTS[::-1], "label": [0, 1, 0, 1, 0]})
    data = hfc.augment(pairs, tokenizer, word_vectors=tiny_model("bert"), text_columns=["text", "text_pair"], copies=8)
    for row in data:
        original = pairs[row["original_row"]]
        changed = [row[name] != original[name] for name in ("text", "text_pair")]
        assert row["label"] == original["label"] and any(changed) == row["is_augmented"]
    copies = data.filter(lambda row: row["is_augmented"])
    assert any(row["text"] != pairs[row["original_row"]]["text"] for row in copies)
    assert any(row["text_pair"] != pairs[row["original_row"]]["text_pair"] for row in copies)


def test_bad_input_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="pass masked_lm, or word_vectors"):
        augment(tokenizer, word_vectors=None)
    with pytest.raises(ValueError, match="columns of texts, got 'n'"):
        augment(tokenizer, text_columns=["text", "n"])
    with pytest.raises(ValueError, match="probability above 0 and at most 1, got 30, 15, 0 and 1.5"):
        augment(tokenizer, probability=1.5)
    with pytest.raises(ValueError, match="has no output embeddings"):
        augment(tokenizer, masked_lm=tiny_model("bert"))
    with pytest.raises(ValueError, match=r"already has the columns \['is_augmented'\]"):
        hfc.augment(dataset().add_column("is_augmented", [0] * 5), tokenizer, word_vectors=tiny_model("bert"))
    (tmp_path / "notes").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="a folder with other files in it"):
        augment(tokenizer, path=tmp_path)
