"""Which of timm's pretrained models load: every architecture shrunk, with random weights, its outputs beside ours.

Needs timm (`pip install --no-deps timm`) and the test environment.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
import timm_models

from tinyvit.checkpoints.checkpoint import CheckpointError
from tinyvit.checkpoints.loading import load_model

MODULES = ("vision_transformer", "deit", "beit", "eva")
HEADS, WIDTH, GRID, TOLERANCE = 4, 96, 5, 1e-5


def problem(architecture: str, folder: Path) -> str:
    """Why timm's model does not load, "" if it does and its outputs are equal."""
    patch = int(match[1]) if (match := re.search(r"patch(\d+)", architecture)) else 16
    side = GRID * patch
    try:
        model = timm_models.small(architecture, img_size=side, embed_dim=WIDTH, num_heads=HEADS)
    except (AssertionError, TypeError) as error:
        return f"cannot be shrunk: {error}"
    path = folder / f"{architecture}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(images).numpy()
    try:
        found = load_model(path, num_heads=HEADS, image_size=side)(images.numpy()).numpy()
    except CheckpointError as error:
        return re.sub(r" \(.*\)", "", str(error).removeprefix(f"{path}: "))
    error = abs(found - expected).max() / abs(expected).max()
    return "" if error <= TOLERANCE else "outputs differ"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="a file for the counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    counts = {}
    with tempfile.TemporaryDirectory() as folder:
        for module in MODULES:
            problems: Counter[str] = Counter()
            for architecture, tags in timm_models.pretrained()[module].items():
                problems[problem(architecture, Path(folder))] += len(tags)
            total, loaded = problems.total(), problems.pop("", 0)
            counts[module] = {"tags": total, "loaded": loaded, "refused": problems}
            print(f"{module}.py: {loaded} of {total} pretrained tags load ({loaded / total:.1%})")
            for why, count in problems.most_common():
                print(f"    {count}: {why}")
    if options.json:
        Path(options.json).write_text(json.dumps(counts, indent=2) + "\n")


if __name__ == "__main__":
    main()
