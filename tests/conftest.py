"""Fixtures that several files use, and how tests compile."""

import collections
import os
import tempfile

# Tests run on CPU wherever they run; libtpu, which compiles for TPUs that are not there, must not look for one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import pytest
from models import QUICK
from test_checkpoints_gguf import write_llama


def pytest_configure(config):
    """Makes compiling, which is most of the tests' time, quick, and has equal programs compiled once.

    Processes that tests start optimise as users' do, unless they are given QUICK.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} {QUICK['XLA_FLAGS']}")
        jax.jit(lambda: 0).lower().compile()  # XLA reads its flags once
    jax.config.update("jax_disable_most_optimizations", True)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers of xdist and processes that tests start inherit it
        folder = tempfile.TemporaryDirectory()
        config.add_cleanup(folder.cleanup)
        os.environ |= {"JAX_COMPILATION_CACHE_DIR": folder.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
        jax.config.update("jax_compilation_cache_dir", folder.name)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def pytest_collection_modifyitems(items):
    """Begins with the files of few tests, which take longest: no worker is to be left with one of them at the end."""
    num_tests = collections.Counter(item.path for item in items)
    items.sort(key=lambda item: num_tests[item.path])


@pytest.fixture(scope="module")
def usual_compiler():
    """Has programs optimised as users' are: for modules that look into them or run a real model."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A tiny GGUF model with tokenizer and chat template."""
    return write_llama(tmp_path_factory.mktemp("model") / "tiny.gguf", {"llama.context_length": 512})


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """A cache folder of the test session's own."""
    monkeypatch.setenv("SPECJAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
