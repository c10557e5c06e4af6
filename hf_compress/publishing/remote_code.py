"""A file of code beside the weights, so that `trust_remote_code=True` loads a compressed model without an import."""

import json
from pathlib import Path

from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

FILE_NAME = "modeling_hf_compress.py"
TEMPLATE = '''"""This checkpoint was made with hf_compress and loads with it: `pip install hf_compress`."""

import hf_compress  # noqa: F401  registers the loader
import transformers

'''


def add_remote_code(model: PreTrainedModel, folder: str | Path) -> None:
    """Let `Auto...from_pretrained(folder, trust_remote_code=True)` load `model` without `import hf_compress`.

    `folder` is where `model.save_pretrained` has written it: gains one Python file, and an `auto_map` in config.json.
    Without the package the load stops and says which package is missing.
    """
    folder = Path(folder)
    names = _auto_classes(model)
    classes = sorted(set(names.values()))
    # The classes keep their names, so that a model loaded this way and saved again still says what it is.
    code = TEMPLATE + "".join(f"\nclass {name}(transformers.{name}):\n    pass\n\n" for name in classes)
    (folder / FILE_NAME).write_text(code, encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    module = FILE_NAME.removesuffix(".py")
    config["auto_map"] = {auto: f"{module}.{name}" for auto, name in sorted(names.items())}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _auto_classes(model: PreTrainedModel) -> dict[str, str]:
    """Auto class -> class, for those that build the class of `model`, and for `AutoModel`."""
    found = {}
    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None) if isinstance(auto, type) else None
        if mapping is None or type(model.config) not in mapping:
            continue
        classes = mapping[type(model.config)]
        for candidate in classes if isinstance(classes, (tuple, list)) else [classes]:
            if candidate.__name__ == type(model).__name__ or auto.__name__ == "AutoModel":
                found[auto.__name__] = candidate.__name__
    return found
