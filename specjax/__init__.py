"""SpecJAX: speculative decoding in JAX, drafter and target in one compiled step.

Dimension key, the same everywhere: B batch, T tokens in this forward, S cache capacity, G drafts, V vocabulary, D
width, L layers, N query heads, K KV heads, H head width, F MLP width.
"""

from specjax.checkpoints.load import Target, load_target
from specjax.config import MeshConfig, SamplingParams, SpeculativeConfig
from specjax.errors import AssetError, CheckpointError, ConfigError, DraftWarning, SpecJAXError
from specjax.generate import GenerationResult, SpeculativeDecoder, StreamChunk
from specjax.metrics import Metrics

__version__ = "0.1.0"

__all__ = [
    "AssetError",
    "CheckpointError",
    "ConfigError",
    "DraftWarning",
    "GenerationResult",
    "MeshConfig",
    "Metrics",
    "SamplingParams",
    "SpecJAXError",
    "SpeculativeConfig",
    "SpeculativeDecoder",
    "StreamChunk",
    "Target",
    "load_target",
]
