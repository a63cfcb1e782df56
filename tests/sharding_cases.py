"""Decoding on meshes of virtual CPU devices, in a process of its own; prints one line of JSON a case.

Run by test_sharding.py: python sharding_cases.py NUM_DEVICES CASE...
"""

import dataclasses
import json
import re
import sys

import jax

if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))

import numpy as np
import pytest
from models import decode_as_usual, random_target
from test_heads import random_weights

import specjax
from specjax import drafters
from specjax.checkpoints.heads import LoadedHead
from specjax.config import MeshConfig
from specjax.heads import config as heads

VOCAB = 4 * 2048  # a device draws from whole chunks of 2048 tokens, as one device does: then seeds give the same
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 1, 4, 1], [2, 7, 2, 7, 2], [8], [5, 5, 5, 5, 5, 5, 5]]
TARGET = random_target(0, VOCAB)
OTHER = random_target(1, VOCAB)
TOKEN_OF = np.arange(0, VOCAB, 2)
LAYER = dataclasses.replace(TARGET.config, num_layers=1, sliding_windows=(None,))
HEAD = heads.eagle3(LAYER, TARGET.config.width, (0, 1, 2), VOCAB // 2)


def decoder_of(method, mesh, **options):
    """A decoder on a mesh, with a head or draft model that lies on it too."""
    config, draft = None, None
    target = TARGET if mesh is None else TARGET.on(mesh)
    if method == "ngram":
        options = {"prompt_lookup_min": 1, "prompt_lookup_max": 2} | options
    if method is not None:
        if method != "ngram":
            options["model"] = "made here"
        config = specjax.SpeculativeConfig(method=method, num_speculative_tokens=3, **options)
    if method in ("eagle3", "hybrid"):
        loaded = LoadedHead(HEAD, random_weights(HEAD, 2), None, TOKEN_OF, None)
        drafters.read_head = lambda *_: loaded
        drafters.pretrained.resolve = lambda *_, **__: "nowhere"
        drafters.check_fit = lambda *_: None
    if method == "draft_model":
        draft = OTHER.beside(target.mesh)
    return specjax.SpeculativeDecoder(target, config, draft=draft, max_batch_size=4)


def tokens(method, mesh, temperature, **options):
    params = [specjax.SamplingParams(temperature=temperature, seed=seed, max_tokens=12) for seed in range(4)]
    decoder = decoder_of(method, mesh, **options)
    return decoder.generate(PROMPTS, params).token_ids, decoder


def compare(method, data, model, temperature=0.0, **options):
    """Tokens on the mesh and on one device, and what the compiled round moves."""
    expected, _ = tokens(method, None, temperature, **options)
    with pytest.MonkeyPatch.context() as patch:
        decode_as_usual(patch)
        found, decoder = tokens(method, MeshConfig(data=data, model=model), temperature, **options)
    program = next(run for key, run in decoder.programs._compiled.items() if key[0] == "decode")
    moved = re.findall(r"= (\w+)\[([\d,]*)\]\S* (all-gather|all-to-all|collective-permute)\(", program.as_text())
    largest = max((int(np.prod([int(n) for n in shape.split(",") if n])) for _, shape, _ in moved), default=0)
    memory = program.memory_analysis()
    return {
        "same": found == expected,
        "largest_gathered": largest,
        "kinds": sorted({kind for *_, kind in moved}),
        "aliased": memory.alias_size_in_bytes,
        "output": memory.output_size_in_bytes,
        "weights": str(decoder.params.target["layer_0"]["qkv"].sharding.spec),
    }


CASES = {
    "plain, sampled": lambda: compare(None, 2, 2, 1.0),
    "ngram": lambda: compare("ngram", 2, 2),
    "draft_model": lambda: compare("draft_model", 2, 2),
    "eagle3": lambda: compare("eagle3", 2, 2),
    "eagle3, sampled": lambda: compare(
        "eagle3", 4, 2, 1.0, draft_sample_method="probabilistic", rejection_sampling_strategy="residual"
    ),
    "eagle3, whole": lambda: compare("eagle3", 1, 2, draft_tensor_parallel_size=1),
    "hybrid": lambda: compare("hybrid", 1, 4, prompt_lookup_min=2),
}

if __name__ == "__main__":
    for name in sys.argv[2:] or CASES:
        print(json.dumps({"case": name} | CASES[name]()), flush=True)
