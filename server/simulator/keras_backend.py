"""What the simulator needs of Keras's backend, TensorFlow or JAX, beyond Keras itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # type: ignore[import-untyped]
from keras import ops

Tensor = Any
"""Of Keras's backend."""


if keras.backend.backend() == "jax":
    import jax

    def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(function)

    def gradients(loss: Callable[[Any], Tensor], at: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The losses [clients], and their gradients: no loss depends on another client's parameters."""

        def total(at: list[Tensor]) -> tuple[Tensor, Tensor]:
            losses = loss(at)
            return ops.sum(losses), losses

        (_, losses), per_array = jax.value_and_grad(total, has_aux=True)(at)
        return losses, per_array

else:
    import tensorflow as tf  # type: ignore[import-untyped]

    def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled: Callable[..., Any] = tf.function(function, jit_compile=True, autograph=False)
        return compiled

    def gradients(loss: Callable[[Any], Tensor], at: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The losses [clients], and their gradients: no loss depends on another client's parameters."""
        with tf.GradientTape() as tape:
            tape.watch(at)
            losses = loss(at)
        return losses, tape.gradient(losses, at)


def devices() -> list[str]:
    """The devices that the work is spread over: all accelerators, or else the processor."""
    available = keras.distribution.list_devices()
    accelerators = [name for name in available if not name.startswith("cpu")]
    return accelerators or available
