"""Pallas kernels for TPU and GPU, one folder an operation. They import jax alone and can be used without specjax."""
