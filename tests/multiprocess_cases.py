"""What several processes do together; test_multiprocess.py starts each of them with

    python multiprocess_cases.py PORT NUM_PROCESSES PROCESS_ID DEVICES FOLDER CASE...

They print one line of JSON a case. A case is NAME@DATAxMODEL, on a mesh of that shape, or one of ENDS.
"""

import json
import os
import signal
import sys
from pathlib import Path

import jax

from specjax import processes

if __name__ == "__main__":
    PORT, NUM, INDEX, DEVICES = map(int, sys.argv[1:5])
    jax.config.update("jax_num_cpu_devices", DEVICES)
    distributed = {"coordinator_address": f"127.0.0.1:{PORT}", "num_processes": NUM, "process_id": INDEX}
    processes.join({"enabled": True, "heartbeat_timeout_seconds": 6, **distributed})

import dataclasses

import numpy as np
from ml_collections import ConfigDict
from models import LetterTokenizer

import specjax
from specjax import drafters, slots
from specjax.checkpoints.heads import LoadedHead
from specjax.config import MeshConfig
from specjax.evaluate import run
from specjax.heads import config as heads
from specjax.heads import network
from specjax.train import features, trainer

features.FORWARD_ROWS = 2
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 1, 4, 1], [2, 7, 2, 7, 2], [8], [5, 5, 5, 5, 5, 5, 5]]
TARGET = {"vocab_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
"""Of the tiny model that the test writes; its vocabulary, heads and MLP can be split in four."""


def eagle3_decoder(target):
    """A decoder with a random head, which proposes every other token."""
    layer = dataclasses.replace(target.config, num_layers=1, sliding_windows=(None,))
    config = heads.eagle3(layer, target.config.width, (0, 1, 2), target.config.vocab_size // 2)
    random = np.random.RandomState(0)
    shapes = network.param_shapes(config)
    params = jax.tree.map(lambda x: random.standard_normal(x.shape).astype(np.float32) / 8, shapes)
    token_of = np.arange(0, target.config.vocab_size, 2)
    drafters.read_head = lambda *_: LoadedHead(config, params, None, token_of, None)
    drafters.pretrained.resolve = lambda *_, **__: "nowhere"
    settings = specjax.SpeculativeConfig(method="eagle3", model="made here", num_speculative_tokens=3)
    return specjax.SpeculativeDecoder(target, settings, max_batch_size=4)


def plain(folder, mesh=None):
    """Sampled and greedy answers to PROMPTS, and texts that end before a letter of the first greedy one."""
    target = specjax.load_target(folder / "target", "float32", mesh)
    target = dataclasses.replace(target, tokenizer=LetterTokenizer())
    decoder = specjax.SpeculativeDecoder(target, max_batch_size=4)
    sampled = [specjax.SamplingParams(temperature=1.0, seed=seed, max_tokens=12) for seed in range(4)]
    greedy = decoder.generate(PROMPTS, specjax.SamplingParams(max_tokens=12))
    ends = specjax.SamplingParams(max_tokens=12, stop=(greedy.texts[0][5],))
    return {
        "sampled": decoder.generate(PROMPTS, sampled).token_ids,
        "greedy": greedy.token_ids,
        "ends": decoder.generate(PROMPTS, ends).texts,
    }


def eagle3(folder, mesh=None):
    """Answers to PROMPTS with a random head, and the share of a weight that this process holds."""
    resolve = drafters.pretrained.resolve
    target = specjax.load_target(folder / "target", "float32", mesh)
    decoder = eagle3_decoder(target)
    drafters.pretrained.resolve = resolve
    weight = target.params["layer_0"]["qkv"]
    shards = {str(shard.index): shard.data.size for shard in weight.addressable_shards}
    greedy = decoder.generate(PROMPTS, specjax.SamplingParams(max_tokens=12)).token_ids
    return {"greedy": greedy, "part": sum(shards.values()) / weight.size}


def evaluate(folder, mesh):
    """An evaluation; it measures in batches whose rows change hands."""
    config = ConfigDict(json.loads((folder / "evaluation.json").read_text()))
    config.mesh = {"data": mesh.data, "model": mesh.model}
    summary = run.evaluate(config, folder / "evaluation")
    return {name: summary["methods"]["ngram"][name] for name in ("identical", "mismatch")}


def train(folder, mesh=None):
    """A training that ends, and one that is stopped in the middle and gone on with."""
    fields = json.loads((folder / "training.json").read_text())
    workdir = folder / f"training-{jax.process_count()}"
    if mesh is not None:
        fields["mesh"] = {"data": mesh.num_devices}
        halfway = trainer.TrainConfig.from_config(ConfigDict(fields))
        kill = KeyboardInterrupt()

        def stop(done, total, description):
            if description.startswith("loss") and done == 4:
                raise kill

        try:
            trainer.train(halfway, workdir, stop)
        except KeyboardInterrupt:
            processes.barrier("stopped")
    summary = trainer.train(trainer.TrainConfig.from_config(ConfigDict(fields)), workdir)
    return {"loss": summary["final"]["loss"], "validation": summary["validation"]["loss"]}


def differ(folder):
    """Ends all processes, after a look at what they can tell each other."""
    assert processes.of_first([processes.index(), 0.5]) == [0, 0.5]
    with processes.own_folder(folder, ["training.json", "nothing"]) as own:
        assert (own == folder) == processes.is_writer()
        assert (own / "training.json").read_bytes() == (folder / "training.json").read_bytes()
    processes.same_everywhere({"repeats": 2, "batch_size": 1 + processes.index()}, "config")


def die(folder):
    """Ends all processes: the last one is killed in the middle of a computation."""
    target = specjax.load_target(folder / "target", "float32", MeshConfig(data=jax.device_count()))
    decoder = specjax.SpeculativeDecoder(target, max_batch_size=4)
    params = [specjax.SamplingParams(max_tokens=num) for num in (8, 400, 400, 400)]
    for _ in slots.completions(decoder, PROMPTS, params, rounds=4):
        if processes.index() == jax.process_count() - 1:
            os.kill(os.getpid(), signal.SIGKILL)


CASES = {"plain": plain, "eagle3": eagle3, "evaluate": evaluate, "train": train}
ENDS = {"differ": differ, "die": die}

if __name__ == "__main__":
    for argument in sys.argv[6:]:
        name, _, sizes = argument.partition("@")
        folder = Path(sys.argv[5])
        if name in ENDS:
            ENDS[name](folder)
            raise AssertionError(f"{name} did not end this process")
        data, model = map(int, sizes.split("x"))
        found = CASES[name](folder, mesh=MeshConfig(data=data, model=model))
        print(json.dumps({"case": argument} | found), flush=True)
