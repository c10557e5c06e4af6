"""Which model a folder holds: the same for the same weights and config, however they are cut into files."""

import hashlib
import json
from pathlib import Path

from hf_compress.files.inside import inside

WITHOUT_EFFECT = ("_name_or_path", "transformers_version", "auto_map")  # change from one save or place to the next


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, none where it has others. ValueError for an index that leads elsewhere."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [file for file in [folder / "model.safetensors"] if file.is_file()]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} cannot be read: {error}.") from error
    return sorted(inside(folder, name) for name in names)


def read_header(file: Path) -> tuple[dict, int]:
    """The header of a safetensors file, and where its tensors begin: 8 bytes of length, then JSON."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        return json.loads(stream.read(size)), 8 + size


def model_identity(folder: str | Path) -> str | None:
    """SHA-256 over every tensor of the model in `folder` by its name, and its config; None without safetensors."""
    folder = Path(folder)
    places = {}
    for file in weight_files(folder):
        header, start = read_header(file)
        places |= {name: (file, start, entry) for name, entry in header.items() if name != "__metadata__"}
    if not places:
        return None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    plain = {name: value for name, value in config.items() if name not in WITHOUT_EFFECT}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for name, (file, start, entry) in sorted(places.items()):
        first, end = entry["data_offsets"]
        digest.update(f"{name} {entry['dtype']} {entry['shape']}".encode())
        with file.open("rb") as stream:
            stream.seek(start + first)
            left = end - first
            while left > 0 and (piece := stream.read(min(left, 1 << 20))):
                digest.update(piece)
                left -= len(piece)
    return digest.hexdigest()
