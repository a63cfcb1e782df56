"""Fixtures that several files use."""

import os

# Tests run on CPU wherever they run; libtpu, which compiles for TPUs that are not there, must not look for one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import pytest
from test_checkpoints_gguf import write_llama


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A tiny GGUF model with tokenizer and chat template."""
    return write_llama(tmp_path_factory.mktemp("model") / "tiny.gguf", {"llama.context_length": 512})


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """A cache folder of the test session's own."""
    monkeypatch.setenv("SPECJAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
