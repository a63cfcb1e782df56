"""Makes tests/goldens/target_logits.npz: logits of transformers' own models, in float32, for every case of tiny.CASES.

    python tests/make_goldens.py

needs torch and transformers (the test extra), takes some seconds and about 300 MB. Run it again after adding or
changing a case, and after a transformers release that changes a model; test_target.py compares transformers with
SpecJAX directly wherever torch is installed, so a golden that went stale shows there.
"""

import tempfile
from pathlib import Path

import numpy as np
import tiny

GOLDENS = Path(__file__).parent / "goldens" / "target_logits.npz"
BATCH, LENGTH = 2, 400
POSITIONS = (0, 1, 6, 7, 8, 9, 31, 64, 150, 199, 200, 255, 256, 257, 399)
"""Kept positions: both sides of the sliding windows, of the seam between test_target's two windows, of the original
contexts of 64, and of the cache block of 256."""


def transformers_model(directory: Path):
    """The directory as transformers reads it, in float32, with attention written out."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    return model.eval()


def main() -> None:
    import torch

    goldens = {}
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        for case in tiny.CASES:
            directory = tiny.write_directory(Path(scratch) / case, tiny.hf_config(case))
            tokens = torch.tensor(tiny.prompt(BATCH, LENGTH), dtype=torch.long)
            logits = transformers_model(directory)(tokens).logits.numpy()
            goldens[case] = logits[:, list(POSITIONS)].astype(np.float32)
            print(f"{case}: logits of standard deviation {logits.std():.1f}, at most {np.abs(logits).max():.1f}")
    GOLDENS.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDENS, **goldens)
    print(f"{GOLDENS}: {GOLDENS.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
