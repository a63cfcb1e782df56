"""Draft heads in float64 numpy, written from the formulas of their papers and checkpoints; one sequence, no cache."""

import numpy as np

RECYCLED_BEHIND_THE_NORM = {"deepseek": True, "glm4_moe": False, "mimo": True, "ernie": False, "qwen3_next": True}
FIRST_EMBEDDING_ZEROED = {"deepseek": True, "glm4_moe": True, "mimo": True, "ernie": True, "qwen3_next": False}


class Weights(dict):
    """A nested dict of float64 arrays that remembers which of them were read."""

    def __init__(self, tree, path="", read=None):
        self.read = set() if read is None else read
        self.path = path
        for name, value in tree.items():
            here = f"{path}/{name}"
            self[name] = Weights(value, here, self.read) if isinstance(value, dict) else np.asarray(value, np.float64)

    def __getitem__(self, name):
        self.read.add(f"{self.path}/{name}")
        return super().__getitem__(name)

    def unread(self):
        """Paths of the arrays that no formula has used."""
        found = set()
        for name, value in self.items():
            found |= value.unread() if isinstance(value, Weights) else {f"{self.path}/{name}"} - self.read
        return found


def rms_norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * scale


def rotated(x, positions, theta):
    """Pairs (i, i + H/2) of [T, H], turned by position * theta^(-2 i / H)."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * theta ** (-np.arange(half) / half)
    a, b = x[:, :half], x[:, half:]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], axis=-1)


def softmax(x):
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def llama_layer(layer, w, x, positions, attention_input):
    """Causal attention of attention_input [T, I], added to x [T, D]; then the SwiGLU MLP behind its norm."""
    heads_per_kv = layer.num_heads // layer.num_kv_heads
    causal = np.tril(np.ones((len(x), len(x)), bool))
    qkv_bias = w["qkv_bias"] if layer.qkv_bias else np.zeros(w["qkv"].shape[1:])
    attended = np.zeros_like(x)
    for kv_head in range(layer.num_kv_heads):
        # The kernel of a KV head holds its queries, then its key, then its value.
        parts = [attention_input @ w["qkv"][:, kv_head, i] + qkv_bias[kv_head, i] for i in range(heads_per_kv + 2)]
        *queries, key, value = parts
        if layer.qk_norm:
            queries = [rms_norm(query, w["q_norm"], layer.norm_eps) for query in queries]
            key = rms_norm(key, w["k_norm"], layer.norm_eps)
        key = rotated(key, positions, layer.rope_theta)
        for index, query in enumerate(queries):
            logits = rotated(query, positions, layer.rope_theta) @ key.T / np.sqrt(layer.head_dim)
            attended += softmax(np.where(causal, logits, -np.inf)) @ value @ w["out"][kv_head, index]
    x = x + attended
    normed = rms_norm(x, w["mlp_norm"], layer.norm_eps)
    gate, up = normed @ w["gate_up"][:, 0], normed @ w["gate_up"][:, 1]
    return x + (gate / (1 + np.exp(-gate)) * up) @ w["down"]


def llama_layers(layer, w, x, positions, first):
    """Ordinary layers from number `first` on."""
    for index in range(first, layer.num_layers):
        block = w[f"layer_{index}"]
        x = llama_layer(layer, block, x, positions, rms_norm(x, block["attention_norm"], layer.norm_eps))
    return x


def eagle(config, w, embedded, feature, positions):
    """h = fc([emb; f]) -> a layer without norm of its input -> the target's head; HASS adds norms."""
    layer, variant = config.layer, config.norm_output
    if variant:
        embedded = rms_norm(embedded, w["embedding_norm"], layer.norm_eps)
    x = np.concatenate([embedded, feature], axis=-1) @ w["join"]
    if config.joining_bias:
        x = x + w["join_bias"]
    first = w["layer_0"]
    read = rms_norm(x, first["attention_norm"], layer.norm_eps) if variant else x
    x = llama_layers(layer, w, llama_layer(layer, first, x, positions, read), positions, 1)
    return (rms_norm(x, w["output_norm"], layer.norm_eps) if variant else x), x


def eagle3(config, w, embedded, feature, positions, norm_output):
    """The first layer's attention reads [norm(emb); norm(g)]; its residual is g, or norm(g)."""
    layer = config.layer
    e = rms_norm(embedded, w["embedding_norm"], layer.norm_eps)
    g = rms_norm(feature, w["hidden_norm"], layer.norm_eps)
    residual = g if config.norm_before_residual else feature
    x = llama_layer(layer, w["layer_0"], residual, positions, np.concatenate([e, g], axis=-1))
    x = llama_layers(layer, w, x, positions, 1)
    normed = rms_norm(x, w["output_norm"], layer.norm_eps)
    return normed, normed if norm_output else x


def mtp(config, w, embedded, feature, positions):
    """proj([enorm(emb); hnorm(h)]), the other way round in MiMo -> a layer -> norm -> head."""
    layer, family = config.layer, config.wiring
    if FIRST_EMBEDDING_ZEROED[family]:
        embedded = np.where(positions[:, None] == 0, 0.0, embedded)
    e = rms_norm(embedded, w["embedding_norm"], layer.norm_eps)
    h = rms_norm(feature, w["hidden_norm"], layer.norm_eps)
    x = np.concatenate([h, e] if family == "mimo" else [e, h], axis=-1) @ w["join"]
    x = llama_layers(layer, w, x, positions, 0)
    normed = rms_norm(x, w["output_norm"], layer.norm_eps)
    return normed, normed if RECYCLED_BEHIND_THE_NORM[family] else x


def fuse(config, w, features):
    """[T, n, D_t] -> [T, D]: g = fc([low; middle; high]) in EAGLE-3, the state itself elsewhere."""
    if config.method != "eagle3":
        return features[:, 0]
    w, eps = w["fusion"], config.layer.norm_eps
    taps = [features[:, i] for i in range(features.shape[1])]
    if config.norm_each_tap:
        taps = [rms_norm(tap, w[f"tap_norm_{i}"], eps) for i, tap in enumerate(taps)]
    joined = np.concatenate(taps, axis=-1)
    if config.norm_before_fusing:
        joined = rms_norm(joined, w["norm"], eps)
    return joined @ w["kernel"]


def run(config, w, shared, tokens, feature, positions, block=0):
    """Logits [T, V'] and what is recycled [T, D], of one block over int[T] tokens and their features [T, D]."""
    embedding = w["embedding"] if config.own_embedding else np.asarray(shared.embedding, np.float64)
    given = config, w[f"block_{block}"], embedding[np.asarray(tokens)], feature, np.asarray(positions)
    if config.method == "eagle3":
        hidden, recycled = eagle3(*given, norm_output=config.recycle_normed)
    else:
        hidden, recycled = {"eagle": eagle, "mtp": mtp}[config.method](*given)
    head = w["head"] if config.own_head else np.asarray(shared.head, np.float64)
    return hidden @ head, recycled


def unrolled(config, w, shared, features, text, last, num_steps):
    """The chain of drafts begun at position `last`, with everything computed anew at each step.

    Step s < num_blocks runs block s over positions 0 .. last, paired with tokens 1 + s later and the block before's
    outputs; a later one runs its block over the same and then over the pairs of its own laps, appended.

    Args:
        features: float[T, n, D_t] of the target, T > last.
        text: tokens 0 .. last + num_steps at least, drafts (or what is true in their place) from last + 2 on.

    Returns:
        Logits [num_steps, V'] and what is recycled [num_steps, D], at the chain's end.
    """
    text = np.asarray(text)
    n = config.num_blocks
    feature = fuse(config, w, np.asarray(features, np.float64)[: last + 1])
    inputs, logits, recycled = [], [], []
    for step in range(num_steps):
        block, lap = step % n, step // n
        if lap == 0:
            inputs.append((text[1 + step : last + 2 + step], feature))
        else:
            tokens, before = inputs[block]
            inputs[block] = np.append(tokens, text[last + 1 + step]), np.vstack([before, recycled[-1]])
        out, feature = run(config, w, shared, *inputs[block], np.arange(last + 1 + lap), block)
        logits.append(out[-1])
        recycled.append(feature[-1])
    return np.array(logits), np.array(recycled)
