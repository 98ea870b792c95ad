"""Keras models of many shapes that the compiler's tests share; a test that imports this is skipped without Keras."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="reads Keras models, and Keras computes with TensorFlow, not installed here")
keras = pytest.importorskip("keras")
L = keras.layers


def mlp():
    return keras.Sequential(
        [keras.Input((64,)), L.Dense(32, "relu", name="hidden"), L.Dense(10, "softmax", name="head")]
    )


def cnn():
    return keras.Sequential(
        [
            keras.Input((13, 11, 2)),
            L.Conv2D(5, 3, strides=(2, 1), padding="same", activation="relu"),
            L.MaxPooling2D(),
            L.Conv2D(4, (2, 3), activation="tanh"),
            L.AveragePooling2D((2, 1), strides=1, padding="same"),
            L.Flatten(),
            L.Dense(7),
            L.ReLU(),
            L.Dense(3),
            L.Softmax(),
        ]
    )


def nested():
    backbone = keras.Sequential(
        [keras.Input((8, 8, 1)), L.Conv2D(3, 3, name="conv"), L.Activation("tanh"), L.MaxPooling2D(3, 2)],
        name="backbone",
    )
    backbone.trainable = False
    inputs = keras.Input((8, 8, 1))
    outputs = L.Dense(4, "softmax", name="head")(L.Flatten()(backbone(inputs)))
    return keras.Model(inputs, outputs)


def regression():
    model = keras.Sequential([keras.Input((5, 3)), L.Flatten(), L.Dense(6, "tanh"), L.Dense(2)])
    model.compile(loss="mse")
    return model


def scores():
    model = keras.Sequential([keras.Input((6,)), L.Dense(5)])
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def branchy():
    """A residual block, a concatenation, depthwise and dilated convolutions: every layer with weights has a bias."""
    x = inputs = keras.Input((9, 8, 3))
    x = short = L.Conv2D(6, 3, padding="same", activation="relu6", name="stem")(x)
    x = L.DepthwiseConv2D(3, padding="same", depth_multiplier=1, name="deep")(x)
    x = L.LeakyReLU(negative_slope=0.1)(x)
    x = L.Add()([L.Conv2D(6, 1, name="point")(x), short])
    left = L.AveragePooling2D(2)(L.Activation("relu")(x))
    right = L.Conv2D(4, 3, strides=2, padding="same", activation="tanh", name="side")(x)
    wide = L.Conv2D(4, 2, dilation_rate=2, padding="same", name="wide")(L.ZeroPadding2D(((0, 0), (1, 0)))(left))
    x = L.Concatenate()([L.GlobalAveragePooling2D()(right), L.GlobalMaxPooling2D()(wide)])
    return keras.Model(inputs, L.Dense(3, "softmax", name="head")(L.Dropout(0.3)(x)))


def sequence():
    return keras.Sequential(
        [
            keras.Input((20, 3)),
            L.Conv1D(5, 3, padding="causal", dilation_rate=2, activation="relu", name="first"),
            L.LayerNormalization(name="norm"),
            L.MaxPooling1D(2),
            L.SeparableConv1D(6, 3, depth_multiplier=2, activation="sigmoid", name="second"),
            L.Dense(4, name="places"),
            L.Flatten(),
            L.Dense(2, "sigmoid", name="head"),
        ]
    )


def normalised():
    """Batch normalizations that fold into what is before them, and one that stands alone; all frozen."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            L.Rescaling(1 / 64, offset=-1.0),
            L.Conv2D(4, 3, use_bias=False, name="conv"),
            L.BatchNormalization(name="folded"),
            L.ReLU(6),
            L.BatchNormalization(scale=False, name="alone"),
            L.DepthwiseConv2D(3, strides=2, depth_multiplier=2, name="deep"),
            L.BatchNormalization(center=False),
            L.Activation("leaky_relu"),
            L.GlobalAveragePooling2D(),
            L.Dense(3, "softmax", name="head"),
        ]
    )
    for layer in model.layers:
        layer.trainable = not isinstance(layer, L.BatchNormalization)
    return model


def values():
    inputs = keras.Input((6,))
    x = L.Dense(8, name="hidden")(inputs)
    x = L.LayerNormalization(epsilon=1e-5, name="norm")(x)
    model = keras.Model(inputs, L.Dense(3, name="head")(L.Activation("tanh")(x)))
    model.compile(loss=keras.losses.Huber(delta=1.0))
    return model


def yes_or_no():
    model = keras.Sequential([keras.Input((6,)), L.Dense(8, "relu", name="hidden"), L.Dense(3, name="head")])
    model.compile(loss=keras.losses.BinaryCrossentropy(from_logits=True))
    return model


def soft_values():
    """A softmax under the squared error, which is an operation of the model."""
    model = flat(L.Dense(5, "tanh"))
    model.compile(loss="mse")
    return model


def randomise(model, seed=0):
    """Biases that are not 0 either; variances above 0."""
    random = np.random.default_rng(seed)
    positive = {id(layer.moving_variance) for layer in model.layers if isinstance(layer, L.BatchNormalization)}
    for variable in model.weights:
        new = random.normal(0, 0.3, variable.shape)
        variable.assign(0.5 + np.abs(new) if id(variable) in positive else new)
    return model


def sample(model, seed=1):
    return np.random.default_rng(seed).normal(size=model.input_shape[1:]).astype(np.float32)


def image(*layers):
    return keras.Sequential([keras.Input((8, 8, 2)), *layers, L.Flatten(), L.Dense(3, "softmax")])


def flat(*layers):
    return keras.Sequential([keras.Input((8,)), *layers, L.Dense(3, "softmax")])
