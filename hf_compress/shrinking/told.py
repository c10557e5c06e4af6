"""What a plan says of itself before it starts."""

from collections.abc import Sequence
from textwrap import fill

from hf_compress.recipe.tasks.classification import Classification
from hf_compress.shrinking.plan import Texts
from hf_compress.shrinking.times import MeasuredTimes
from hf_compress.shrinking.wish import Wish

WIDTH = 80


def plan_text(
    wish: Wish, target: float, times: MeasuredTimes | None, runtime: str, task: str, texts: Texts, written: list[dict],
    depths: Sequence[int], steps: int,
) -> str:  # fmt: skip
    """Lines for a terminal: the wish, what was measured for it, and the stages that are to meet it; before them
    `steps` of the structures with so many layers, if there are any."""
    lines = [f"wanted    {wish.text(wish.value)}, in {runtime}"]
    if times is not None:
        parts, here = times.structure, runtime if runtime != "torch" else "8 bit"
        whole = "" if times.whole is None else f"{times.whole:.2f} ms with all layers; of about the aim "
        told = (
            f"{parts.fixed:.2f} ms and {parts.layer:.2f} a layer: heads {parts.heads:.2f}, neurons {parts.neurons:.2f}"
        )
        lines.append(f"measured  {times.original:.2f} ms in PyTorch, on {times.machine}")
        lines.append(fill(f"{here:<9} {whole}{told}", WIDTH, subsequent_indent=" " * 10))
        lines.append(f"aim       {target:.2f} ms for a text of what is chosen")
    told = f" with a label, {texts.unlabelled:,} without" if task == Classification.name else f" for {task}"
    lines.append(f"texts     {texts.labelled:,}{told}")
    if depths:
        numbers = " and ".join([", ".join(map(str, depths[:-1])), str(depths[-1])] if depths[1:] else map(str, depths))
        evenly = f"evenly with {numbers} layer{'s' * (depths[-1] > 1)}"
        told = f"{steps} steps each by worth over cost, and {evenly}; the best goes on"
        lines.append(fill(f"tried     {told}", WIDTH, subsequent_indent=" " * 10))
    names = [*map(_in_words, written), *([f"export to {runtime}"] if runtime != "torch" else []), "compare"]
    return "\n".join([*lines, fill(f"stages    {', '.join(names)}", WIDTH, subsequent_indent=" " * 10)])


def _in_words(stage: dict) -> str:
    ((kind, options),) = stage.items()
    if kind == "together":
        return "8 bit with trained ranges"
    layers = options.get("num_hidden_layers")
    return {
        "prune": "cut structure" if options.get("method") != "vocabulary" else "cut vocabulary" + (
            f" to what occurs {options['min_count']} times" if options["min_count"] > 1 else ""),
        "distil": "distil" if layers is None else f"distil into {layers} layer{'s' * (layers > 1)}",
        "quantize": "8 bit",
    }.get(kind, kind)  # fmt: skip
