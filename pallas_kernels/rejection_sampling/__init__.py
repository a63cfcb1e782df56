"""Acceptance of drafted tokens: how many are kept, and which token follows them."""

from pallas_kernels.rejection_sampling.api import (
    IMPLEMENTATIONS,
    RULES,
    check_inputs,
    default_implementation,
    rejection_sample,
)
from pallas_kernels.rejection_sampling.base import NO_DRAFT, Truncation, Verdict

__all__ = [
    "IMPLEMENTATIONS",
    "NO_DRAFT",
    "RULES",
    "Truncation",
    "Verdict",
    "check_inputs",
    "default_implementation",
    "rejection_sample",
]
