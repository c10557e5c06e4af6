"""What papers claim, as queries over the board: reproduced, refuted, or not decided by the cells that there are."""

from collections.abc import Sequence
from dataclasses import dataclass

from evidence.cells import SUBJECT
from evidence.results import Row, difference, groups_of

POINT = 0.01


@dataclass(frozen=True)
class Claim:
    """`candidate` is better than `reference` by more than `margin`, in accuracy; a negative one: loses no more."""

    source: str
    words: str
    candidate: str
    reference: str
    margin: float = 0.0


CLAIMS = (
    Claim("Sun et al., 2019", "PKD beats soft targets", "pkd", "soft-targets"),
    Claim("Jiao et al., 2020", "TinyBERT beats PKD", "tinybert", "pkd"),
    Claim("Jiao et al., 2020", "TinyBERT beats soft targets", "tinybert", "soft-targets"),
    Claim("Hinton et al., 2015", "soft targets beat labels alone", "soft-targets", "labels-alone"),
    Claim("Ba and Caruana, 2014", "regression of logits beats labels alone", "logits", "labels-alone"),
    Claim("Wang et al., 2020", "MiniLM beats soft targets", "minilm", "soft-targets"),
    Claim("Xu et al., 2020", "Theseus beats soft targets", "theseus", "soft-targets"),
    Claim("Sanh et al., 2019; Fan et al., 2020", "layers evenly spaced beat the last ones", "soft-targets",
          "soft-targets-last"),
    Claim("Sun et al., 2019", "the first layers do as well as those evenly spaced, within a point",
          "soft-targets-first", "soft-targets", -POINT),
    Claim("Michel et al., 2019", "40% of the heads go without training at a loss of a point at most", "heads-40",
          SUBJECT, -POINT),
    Claim("Prasanna et al., 2020", "half of the neurons go without training at a loss of a point at most", "neurons-50",
          SUBJECT, -POINT),
    Claim("Narang et al., 2017", "group lasso helps blocks of 16 at 75%", "blocks-75-lasso", "blocks-75"),
    Claim("Sun et al., 2023", "Wanda beats magnitude at 60%, without training", "weights-60-wanda",
          "weights-60-at-once"),
    Claim("Shen et al., 2020", "2.5 bits by Fisher information beat 2 everywhere, trained", "qbert-mixed", "qbert-2"),
    Claim("Shen et al., 2020", "3 bits on average by Fisher information beat 3 everywhere, untrained", "rtn-3-mixed",
          "rtn-3"),
    Claim("Frantar et al., 2023", "GPTQ beats rounding to nearest at 2 bits", "gptq-2", "rtn-2"),
    Claim("Frantar et al., 2023", "GPTQ beats rounding to nearest at 3 bits", "gptq-3", "rtn-3"),
    Claim("Cheng et al., 2023", "signed gradients beat rounding to nearest at 2 bits", "signround-2", "rtn-2"),
    Claim("DWQ (MLX)", "scales that follow the float model beat rounding at 2 bits", "scales-2", "rtn-2"),
    Claim("DWQ (MLX)", "scales that follow the float model beat GPTQ alone at 2 bits", "gptq-scales-2", "gptq-2"),
    Claim("DWQ (MLX)", "GPTQ and such scales beat Q-BERT's training at 2 bits", "gptq-scales-2", "qbert-2"),
    Claim("Choi et al., 2017", "k-means weighted by the Hessian beats k-means at 2 bits", "kmeans-2-hessian",
          "kmeans-2"),
    Claim("Li et al., 2016", "three levels beat two", "ternary", "binary"),
    Claim("Esser et al., 2020", "learned steps beat those searched for at 2 bits", "qat-2-steps", "qat-2"),
    Claim("Fan et al., 2021", "rounding a share of the weights at a time beats rounding all at 2 bits", "qat-2-noise",
          "qat-2"),
    Claim("Zhu et al., 2017", "trained ternary values beat 2 bits of one scale", "qat-2-ternary", "qat-2"),
    Claim("Mirzadeh et al., 2020", "an assistant beats the teacher alone", "assistant", "soft-targets"),
    Claim("Sanh et al., 2020", "movement beats magnitude at 75%", "weights-75-movement", "weights-75"),
    Claim("Frankle and Carbin, 2019", "weights back at their start do as well, within a point", "weights-75-rewind",
          "weights-75", -POINT),
    Claim("Hassibi and Stork, 1993", "optimal brain surgeon beats damage at 60%", "weights-60-surgeon",
          "weights-60-damage"),
    Claim("Kurtic et al., 2023", "pieces by importance over cost beat even ones, at a sixth of the multiply-adds",
          "sixth-chosen", "sixth-even"),
    Claim("Srinivas and Babu, 2015", "merging neurons beats cutting those of small weights", "neurons-50-merged",
          "neurons-50-norms"),
    Claim("Jacob et al., 2018", "8 bits cost no more than a point without training", "rtn-8", SUBJECT, -POINT),
    Claim("Frantar et al., 2023", "4 bits by GPTQ cost no more than a point", "gptq-4", SUBJECT, -POINT),
)  # fmt: skip


def verdict(claim: Claim, rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """(subject, verdict, figures) of each subject that has both rows.

    Decided where all of the interval lies on one side of the margin. That of one training knows the chance of the texts
    alone, which is told.
    """
    found = []
    for subject, own in groups_of(rows).items():
        by_name = {row.method: row for row in own}
        row, reference = by_name.get(claim.candidate), by_name.get(claim.reference)
        if row is None or reference is None:
            continue
        interval = difference(reference, row)
        word = "not decided"
        if interval.low > claim.margin:
            word = "reproduced"
        elif interval.high < claim.margin:
            word = "refuted"
        if any(one.records[0]["texts"] and len(one.seeds) == 1 for one in (row, reference)) and word != "not decided":
            word += ", by one training"
        value, low, high = (100 * one for one in (interval.value, interval.low, interval.high))
        numbers = [len(one.seeds) for one in (row, reference) if one.method != SUBJECT]
        seeds = f"{' and '.join(map(str, numbers))} seed{'s' * (numbers[-1] > 1)}"
        found.append((subject, word, f"{value:+.1f} points ({low:+.1f} to {high:+.1f}; {seeds})"))
    return found


def claim_rows(rows: Sequence[Row]) -> list[list[str]]:
    """A table, its header first. Claims without both rows are told as such."""
    table = [["claim", "source", "subject", "verdict", "difference, 95% interval"]]
    for claim in CLAIMS:
        found = verdict(claim, rows) or [("-", "not decided: no cells", "-")]
        table += [[claim.words, claim.source, subject, word, figures] for subject, word, figures in found]
    return table
