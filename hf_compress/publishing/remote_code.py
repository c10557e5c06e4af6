"""A file of code beside the weights, so that `trust_remote_code=True` loads a compressed model without an import."""

import json

from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

FILE_NAME = "modeling_hf_compress.py"
TEMPLATE = '''"""This checkpoint was made with hf_compress and loads with it: `pip install hf_compress`."""

import hf_compress  # noqa: F401  registers the loader
import transformers

'''


def remote_code(model: PreTrainedModel, config: str) -> dict[str, bytes]:
    """The files with which `Auto...from_pretrained(folder, trust_remote_code=True)` loads `model` without `import
    hf_compress`: one of Python, and `config`, the text of config.json, with an `auto_map` at its end.

    Nothing else of the text changes. Without the package the load stops and says which package is missing. Raises
    ValueError for a config that names other code.
    """
    names = _auto_classes(model)
    module = FILE_NAME.removesuffix(".py")
    auto_map = {auto: f"{module}.{name}" for auto, name in sorted(names.items())}
    # The classes keep their names, so that a model loaded this way and saved again still says what it is.
    classes = "".join(f"\nclass {name}(transformers.{name}):\n    pass\n\n" for name in sorted(set(names.values())))
    found = json.loads(config).get("auto_map", auto_map)
    if found != auto_map:
        raise ValueError(f"config.json has an auto_map of other code, {found!r}, which is not published. Take it out.")
    if '"auto_map"' not in config:
        body = config.rstrip().removesuffix("}").rstrip()
        written = json.dumps({"auto_map": auto_map}, indent=2).partition("\n")[2]
        config = f"{body},\n{written}\n"
    return {FILE_NAME: (TEMPLATE + classes).encode(), "config.json": config.encode()}


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
