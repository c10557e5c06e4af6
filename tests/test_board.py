"""The board on a tiny subject: what is done is kept, what is remade is the same, and what is broken is named."""

import shutil
import sys
import zipfile
from pathlib import Path

import pandas
import pytest
import torch
from recipe_run import tiny_folder

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import board  # noqa: E402
import evidence.sources as sources  # noqa: E402
import peers  # noqa: E402
from checks.overlap import counted, overlaps, words_of  # noqa: E402
from evidence.cells import SUBJECT as SUBJECT_ROW  # noqa: E402
from evidence.cells import packed, unpacked  # noqa: E402
from evidence.claims import CLAIMS, Claim, verdict  # noqa: E402
from evidence.curves import frontier  # noqa: E402
from evidence.methods import TEXTS, Method, find_methods  # noqa: E402
from evidence.results import Records, crossed_interval, difference, groups_of, rows_of  # noqa: E402
from evidence.subjects import find_subjects  # noqa: E402
from evidence.texts import write_texts  # noqa: E402

from hf_compress.recipe.options import RecipeError  # noqa: E402

TRAIN = (
    "max_steps: 2, per_device_train_batch_size: 8, learning_rate: 1e-3, disable_tqdm: true, bf16: false, use_cpu: true"
)
SUBJECT = f"""task: sequence-classification
model: model
data: {{source: reviews.csv, max_length: 12}}
stages:
  - fine-tune: {{{TRAIN}}}
"""
RECIPES = {
    "distillation/alone": f"stages:\n  - distil: {{num_hidden_layers: 1, {TRAIN}}}\n",
    "quantization/rtn-8": "stages:\n  - quantize: {bits: 8}\n",
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with data, one subject that is made, and two methods."""
    folder = tmp_path_factory.mktemp("board")
    tiny_folder(folder / "data" / "model")
    rows = [f"x{i} the y{i} {('bad', 'good')[i % 2]} z{i} film,{('neg', 'pos')[i % 2]}" for i in range(80)]
    (folder / "data" / "reviews.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    (folder / "subjects").mkdir()
    (folder / "subjects" / "tiny.yaml").write_text(SUBJECT, encoding="utf-8")
    for name, text in RECIPES.items():
        write_recipe(folder, name, text)
    find_subjects(folder / "data", folder / "out", folder / "subjects")["tiny"].prepare()
    return folder


@pytest.fixture
def place(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "place")


def write_recipe(place, name, text):
    file = place / "recipes" / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def run(place, *words):
    folders = {"data": "data", "output": "out", "records": "board.jsonl", "docs": "docs", "recipes": "recipes",
               "subjects": "subjects"}  # fmt: skip
    given = [word for name, folder in folders.items() for word in (f"--{name}", str(place / folder))]
    return board.main([*given, "--here", "--rounds", "2", "1", "--seeds", "0", "--texts", "16", *words])


def records(place):
    return {key[:3]: record for key, record in Records(place / "board.jsonl").all.items()}


def test_cells_are_made_once_and_remade_alike(place, capsys):
    assert run(place) == 0
    made = records(place)
    assert sorted(made) == [("tiny", "alone", 0), ("tiny", "as stored", 0), ("tiny", "rtn-8", 0)]
    cell = made["tiny", "alone", 0]
    assert cell["texts"] == 16 and cell["seconds"] > 0 and cell["device"] and cell["kind"] == "distillation"
    assert sum(unpacked(cell["answers"], cell["examples"])) == round(cell["quality"] * cell["examples"])
    assert made["tiny", "rtn-8", 0]["stored_bytes"] < made["tiny", "as stored", 0]["stored_bytes"]
    assert not (place / "out" / "cells" / "tiny" / "alone-0").exists()
    before = (place / "board.jsonl").read_bytes()
    capsys.readouterr()
    assert run(place) == 0 and (place / "board.jsonl").read_bytes() == before
    assert "tiny/" not in capsys.readouterr().out
    assert run(place, "--only", "tiny/alone", "--remake") == 0
    again = records(place)["tiny", "alone", 0]
    assert again["answers"] == cell["answers"] and again["before"]["differ"] == 0
    text = (place / "docs" / "board.md").read_text(encoding="utf-8")
    assert "2 cells of 2 methods on 1 subject (seed 0: 2 of 2 methods)" in text
    assert "quantization/rtn-8" in text and "0 of 16 answers differ" in text and cell["device"] in text
    assert (place / "docs" / "images" / "board-tiny.png").stat().st_size > 5000
    assert "images/board-tiny.png" in (place / "docs" / "board.html").read_text(encoding="utf-8")


@pytest.mark.long
def test_a_changed_recipe_is_made_again_and_what_stands_around_the_table_stays(place):
    assert run(place, "--only", "tiny/rtn-8") == 0
    file = place / "docs" / "board.md"
    file.write_text(file.read_text(encoding="utf-8").replace("# Board\n", "# Board\n\nWhat I say.\n") + "\nThe end.\n",
                    encoding="utf-8")  # fmt: skip
    first = records(place)["tiny", "rtn-8", 0]
    write_recipe(place, "quantization/rtn-8", "description: another\n" + RECIPES["quantization/rtn-8"])
    assert run(place, "--only", "tiny/rtn-8") == 0 and records(place)["tiny", "rtn-8", 0] == first
    write_recipe(place, "quantization/rtn-8", "stages:\n  - quantize: {bits: 4}\n")
    assert run(place, "--report") == 0 and "rtn-8 (an earlier recipe)" in file.read_text(encoding="utf-8")
    assert run(place, "--only", "tiny/rtn-8") == 0
    assert records(place)["tiny", "rtn-8", 0]["stored_bytes"] < first["stored_bytes"]
    text = file.read_text(encoding="utf-8")
    assert text.count("What I say.") == text.count("The end.") == text.count("### tiny") == 1


def test_a_cell_that_was_cut_off_goes_on(place, monkeypatch):
    """What a kill leaves: stages are there, the record is not."""
    kept = Records.keep
    monkeypatch.setattr(Records, "keep", lambda self, record: exit(9) if record["kind"] else kept(self, record))
    with pytest.raises(SystemExit):
        run(place, "--only", "tiny/alone")
    (stage,) = (place / "out" / "cells" / "tiny" / "alone-0" / "stages").iterdir()
    stamp = (stage / "model" / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(Records, "keep", lambda self, record: kept(self, record) or stamps.append(
        (stage / "model" / "model.safetensors").stat().st_mtime_ns))  # fmt: skip
    stamps = []
    assert run(place, "--only", "tiny/alone") == 0 and stamps == [stamp]


@pytest.mark.parametrize("text, words", [
    ("stages:\n  - quantize: {bitts: 8}\n", "bitts"),
    ("stages: [\n", "not valid YAML"),
    (f"stages:\n  - fine-tune: {{{TRAIN.replace('max_steps: 2', 'max_steps: 3')}}}\n", "24 texts, of at most 16"),
    ("stages:\n  - fine-tune: {num_train_epochs: 1}\n", "must say max_steps"),
    ("seed: 3\nstages:\n  - quantize: {bits: 8}\n", "leave them out"),
    ("stages:\n  - quantize: {bits: 8}\n  - evaluate: {}\n", "the board measures"),
], ids=["option", "yaml", "too-many-texts", "no-steps", "seed", "evaluate"])  # fmt: skip
def test_a_recipe_that_is_not_on_equal_terms_is_named(place, capsys, text, words):
    write_recipe(place, "distillation/broken", text)
    assert run(place) == 2
    error = capsys.readouterr().err
    assert "distillation/broken.yaml" in error and words in error
    assert not (place / "board.jsonl").exists()


@pytest.mark.long
def test_a_cell_that_fails_is_named_and_the_others_are_made(place, capsys):
    write_recipe(place, "distillation/deep", f"stages:\n  - distil: {{num_hidden_layers: 99, {TRAIN}}}\n")
    assert run(place) == 2
    assert "distillation/deep.yaml" in capsys.readouterr().err
    assert ("tiny", "rtn-8", 0) in records(place) and ("tiny", "deep", 0) not in records(place)


def test_only_names_what_is_there(place, capsys):
    assert run(place, "--only", "tiny/rtn-9") == 2 and "rtn-8" in capsys.readouterr().err


def test_two_recipes_of_one_name_are_refused(place):
    write_recipe(place, "pruning/rtn-8", RECIPES["quantization/rtn-8"])
    with pytest.raises(RecipeError, match=r"quantization/rtn-8\.yaml: pruning has a recipe"):
        find_methods(place / "recipes")


def test_train_texts_that_are_held_out_too_are_taken_out(place):
    held_out = "the film was so good that I saw it again"
    texts = {
        "train": [*(f"{held_out} on day {i}" for i in range(3)), "The film: was so GOOD that I saw it again!",
                  *(f"a{i} b{i} c{i} d{i} e{i}" for i in range(20))],
        "validation": [f"f{i} g{i} h{i} i{i} j{i}" for i in range(8)],
        "test": [*(f"k{i} l{i} m{i} n{i} o{i}" for i in range(8)), held_out, "d1 e1 and more, c1"],
    }  # fmt: skip
    folder = place / "data" / "split"
    folder.mkdir()
    for name, own in texts.items():
        lines = ["text\tlabel", *(f"{text}\t{('neg', 'pos')[i % 2]}" for i, text in enumerate(own))]
        (folder / f"{name}.tsv").write_text("\n".join(lines), encoding="utf-8")
    (place / "subjects" / "tiny.yaml").write_text(SUBJECT.replace("reviews.csv", "split"), encoding="utf-8")
    subject = find_subjects(place / "data", place / "out", place / "subjects")["tiny"]
    facts = write_texts(subject._data(), place / "texts")
    assert facts == {"train": 24, "taken_out": 4, "validation": {"texts": 8, "same": 0, "nearly": 0},
                     "test": {"texts": 10, "same": 1, "nearly": 0}}  # fmt: skip
    kept = (place / "texts" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(kept) == 20 and not any("film" in line for line in kept)
    (folder / "train.tsv").write_text(f"text\tlabel\n{held_out}\tpos\n{held_out}!\tneg", encoding="utf-8")
    with pytest.raises(RecipeError, match="nothing is left"):
        write_texts(subject._data(), place / "others")


def test_texts_of_a_package_are_split_once_and_tell_nobodys_name(tmp_path, monkeypatch):
    said = ["RT @nyt new flu vaccine works http://t.co/a1", "new flu vaccine works", "too short #NBCHealth news"]
    rows = [*said, *(f"tweet number {i} of this desk" for i in range(9))]
    table = pandas.DataFrame({"source_id": [f"NBCHealth-{i}" for i in range(len(rows))], "text": rows})
    (tmp_path / "data" / "en").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "data" / "en" / "healthtweets.zip", "w") as archive:
        archive.writestr("healthtweets.csv", table.to_csv(index=False))
    found = sources.desks(tmp_path)
    assert found["text"].tolist()[:2] == ["new flu vaccine works"] * 2 and len(found) == len(rows) - 1
    assert set(found["label"]) == {"nbchealth"}
    monkeypatch.setattr(sources, "TEST", 3)
    monkeypatch.setattr(sources, "VALIDATION", 2)
    sources.write_splits(found, tmp_path / "desks")
    splits = {name: pandas.read_csv(tmp_path / "desks" / f"{name}.csv") for name in ("train", "validation", "test")}
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [5, 2, 3]
    assert len(set(pandas.concat(splits.values())["text"])) == len(found) - 1  # each text once


def test_a_peer_answers_the_same_texts_and_what_it_answered_is_kept(place, capsys, monkeypatch):
    asked = []

    def worse(model, texts, seed):
        asked.append(seed)
        torch.nn.init.zeros_(model.classifier.weight)
        torch.nn.init.constant_(model.classifier.bias[:1], 9.0)  # always the first label
        return model

    monkeypatch.setattr(peers, "PAIRS", {"worse": (worse, "rtn-8", True)})
    options = ["peers.py", "--data", str(place / "data"), "--output", str(place / "out"), "--subject", "tiny"]
    options += ["--subjects", str(place / "subjects"), "--recipes", str(place / "recipes"), "--texts", "16"]
    monkeypatch.setattr(sys, "argv", [*options, "--seeds", "0", "1"])
    tables = []
    for _ in range(2):
        peers.main()
        tables.append(capsys.readouterr().out)
    assert asked == [0, 1] and tables[0] == tables[1]
    (row,) = [line for line in tables[0].splitlines() if line.startswith("| worse")]
    texts = peers.Texts(find_subjects(place / "data", place / "out", place / "subjects")["tiny"])
    first = sum(row["labels"] == 0 for row in texts.test)
    assert f"| worse | {first / len(texts.test):.1%} |" in row and "(`rtn-8`)" in row


def test_overlap_by_hand():
    train = ["One two three four five six seven.", "Good!", "a b c d e x y z", "good", "..."]
    held_out = ["one TWO three, four five six seven", "good", "a b c d e f", "nothing of it", "", "b c d e g"]
    found = {(match.held_out, match.train): match for match in overlaps(train, held_out)}
    assert sorted(found) == [(0, 0), (1, 1), (1, 3), (2, 2)]
    assert [match.share for _, match in sorted(found.items())] == [1.0, 1.0, 1.0, 0.5]  # at last, one run of two
    assert counted(list(found.values())) == (2, 1)
    assert overlaps(train, ["a b c d e f g"]) == []  # one of three
    (longer,) = overlaps(train, ["one two three four five"])
    assert not longer.is_same  # it stands in a longer text
    assert words_of("ﬁlm, Straße") == ["film", "strasse"]
    with pytest.raises(ValueError, match="share within"):
        overlaps(train, held_out, share=0.0)


def test_answers_are_kept_as_bits():
    answers = [0, 0, 1, 0, 1, 1, 0, 0, 1]
    assert packed(answers) == "059" and unpacked("059", 9) == answers
    with pytest.raises(ValueError, match="right or wrong"):
        packed([0.5])


BASE = {"kind": "", "recipe": "made so", "test_texts": "these"}
MACHINE = {"device": "A", "threads": 1, "versions": {"torch": "2"}}


def record(method, seed, answers, kind="quantization", **more):
    own = {"subject": "s", "method": method, "kind": kind, "seed": seed, "fingerprint": "f", "recipe": "", "texts": 0}
    found = {"answers": packed(answers), "examples": len(answers), "quality": sum(answers) / len(answers)}
    return {**own, **found, **MACHINE, "latency": [1.0, 0.9, 1.1], **more}


def base(answers, fingerprint="f", **more):
    return record(SUBJECT_ROW, 0, answers, fingerprint=fingerprint, **{**BASE, **more})


def test_the_interval_draws_texts_and_seeds():
    values = torch.zeros(2, 400, dtype=torch.double)
    values[0, :40] = 1.0  # the seeds differ by a tenth: chance of a seed, as of texts
    both, alone = crossed_interval(values), crossed_interval(values[:1])
    assert both.value == pytest.approx(0.05) and alone.value == pytest.approx(0.1)
    deviation = (0.1 * 0.9 / 400) ** 0.5  # of the mean of 400 texts
    assert alone.high - alone.low == pytest.approx(2 * 1.96 * deviation, rel=0.15)  # 4000 draws of both ends
    assert both.low == pytest.approx(0.0, abs=1e-9) and both.high > 0.1  # both draws one seed twice, now and then
    apart = crossed_interval(values[:1], values)  # the rows that are taken off are drawn too
    assert apart.value == pytest.approx(0.05) and apart.high - apart.low > alone.high - alone.low


def test_verdicts_follow_the_intervals():
    good, bad, little = [1] * 100, [1] * 60 + [0] * 40, [1] * 59 + [0] * 40 + [1]
    rows = rows_of([base(good), record("a", 0, good), record("b", 0, bad), record("c", 0, little)])
    words = [verdict(Claim("", "", *names, margin), rows)[0][1] for names, margin in [
        (("a", "b"), 0.0), (("b", "a"), 0.0), (("c", "b"), 0.0), (("a", "b"), -0.01), (("b", "a"), -0.01)]]  # fmt: skip
    assert words == ["reproduced", "refuted", "not decided", "reproduced", "refuted"]
    trained = rows_of([base(good), record("a", 0, good, texts=16), record("b", 0, bad)])
    assert verdict(Claim("", "", "a", "b"), trained)[0][1] == "reproduced, by one training"
    assert verdict(Claim("", "", "a", "missing"), rows) == []


def test_seeds_are_paired_where_both_have_them():
    found = [record("a", 0, [1, 0, 1]), record("a", 1, [0, 1, 1]), record("b", 0, [1, 0, 0]), record("b", 1, [0, 1, 0])]
    found.append(base([1, 1, 1]))
    rows = {row.method: row for row in rows_of(found)}
    same = torch.tensor([[0, 0, 1], [0, 0, 1]], dtype=torch.double)  # what each pair of seeds differs by
    assert difference(rows["b"], rows["a"]) == crossed_interval(same)
    assert rows["a"].quality == pytest.approx(2 / 3) and rows["a"].spread == 0.0


def test_the_frontier_holds_what_none_beats():
    points = [(1.0, 1.0), (2.0, 3.0), (3.0, 2.0), (4.0, 4.0)]
    assert frontier(points, smaller=True) == [(1.0, 1.0), (2.0, 3.0), (4.0, 4.0)]
    assert frontier(points, smaller=False) == [(4.0, 4.0)]


def test_rows_join_machines_and_speeds_are_those_of_one():
    other = {"device": "B", "latency": [9.0, 8.0, 10.0]}
    slow, fast = (record("a", seed, [1, 1], **one) for seed, one in enumerate([{}, other]))
    for most, expected in ((slow, slow["latency"]), (fast, [9.0, 8.0, 10.0])):
        _, row = rows_of([base([1, 1]), slow, fast, {**most, "seed": 2}])
        assert [*vars(row.speed("latency")).values()] == expected and row.quality == 1.0 and len(row.machines) == 2


def test_a_row_is_held_against_the_model_that_each_seed_began_with():
    """A model that another machine remakes is better or worse than the first; that is no merit of a method."""
    first, better = [1] * 60 + [0] * 40, [1] * 80 + [0] * 20
    lost = {"f": [1] * 50 + [0] * 50, "g": [1] * 70 + [0] * 30}  # each a tenth less than its own
    made = [
        base(first),
        base(better, "g"),
        *(record("a", i, lost[name], fingerprint=name) for i, name in enumerate("fg")),
    ]
    made += [record("b", i, first) for i in range(2)]  # as good as the model that both seeds began with
    subject, a, b = sorted(rows_of(made), key=lambda row: row.method != SUBJECT_ROW)[:1] + [
        row for name in "ab" for row in rows_of(made) if row.method == name]  # fmt: skip
    assert difference(subject, a).value == pytest.approx(-0.1) and difference(subject, b).value == 0
    assert difference(b, a).value == pytest.approx(-0.1) and difference(b, a).high < 0  # -0.05 of the answers as such
    assert [list(groups_of(rows_of(made))), subject.quality] == [["s"], pytest.approx(0.7)]


def test_models_of_other_terms_stand_apart(tmp_path):
    made = [base([1, 1]), record("a", 0, [1, 0]), base([0, 1], "g", test_texts="others"),
            record("a", 2, [0, 0], fingerprint="g")]  # fmt: skip
    groups = groups_of(rows_of(made))
    assert {name: [(row.method, row.seeds) for row in own] for name, own in groups.items()} == {
        "s": [(SUBJECT_ROW, [0]), ("a", [0])], "s-2": [(SUBJECT_ROW, [0]), ("a", [2])]}  # fmt: skip
    with pytest.raises(RecipeError, match="not the model"):
        rows_of(made[1:2])
    records = Records(tmp_path / "records.jsonl")
    for one in (*made, base([1, 0], "h")):  # h: of the terms of f, by another machine
        records.keep(one)
    known = {name: records.of({**made[1], "fingerprint": name}) for name in "fgh"}
    assert known == {"f": made[1], "g": None, "h": made[1]} and len(Records(records.file).all) == 5


METHODS = sorted((ROOT / "scripts" / "evidence" / "recipes").glob("*/*.yaml"))


@pytest.mark.parametrize("file", METHODS, ids=[file.stem for file in METHODS])
def test_a_method_of_the_board_is_a_recipe_on_equal_terms(file):
    method = Method.read(file)
    assert method.recipe.description and method.trained_texts in (0, TEXTS)


def test_claims_are_of_methods_that_are_there():
    names = {SUBJECT_ROW, *find_methods()}
    assert not [claim for claim in CLAIMS if {claim.candidate, claim.reference} - names]


def test_the_board_holds_what_its_records_say():
    """docs/board.md is remade from docs/board.jsonl by `python scripts/board.py --report`."""
    methods = find_methods()
    made = board.board(list(Records(ROOT / "docs" / "board.jsonl").all.values()), methods)
    assert made.strip() in (ROOT / "docs" / "board.md").read_text(encoding="utf-8")
