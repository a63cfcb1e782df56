"""Attention of a window of tokens over a KV cache: decoding and verification."""

from pallas_kernels.attention.api import IMPLEMENTATIONS, attention, check_inputs, write_and_attend
from pallas_kernels.attention.base import HIDDEN, suits

__all__ = ["HIDDEN", "IMPLEMENTATIONS", "attention", "check_inputs", "suits", "write_and_attend"]
