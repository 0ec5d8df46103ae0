"""The model, its training, and each partition's data."""

import numpy as np


def load_data(partition_id, examples, features):
    """Loads one partition: points on two sides of a plane, drawn around a centre of its own."""
    truth = np.random.default_rng(0).normal(size=features)
    rng = np.random.default_rng(1000 + partition_id)
    inputs = rng.normal(loc=rng.normal(scale=0.3, size=features), size=(examples, features))
    targets = (inputs @ truth > 0).astype(np.float64)
    split = examples * 4 // 5
    return (inputs[:split], targets[:split]), (inputs[split:], targets[split:])


def predict(weights, bias, inputs):
    """Returns the probability of class 1 for each example."""
    return 1 / (1 + np.exp(-(inputs @ weights + bias[0])))


def train(weights, bias, data, epochs, learning_rate):
    """Trains in place by gradient descent; returns the last loss."""
    inputs, targets = data
    loss = 0.0
    for _ in range(epochs):
        probability = predict(weights, bias, inputs)
        loss = -np.mean(np.log(np.where(targets == 1, probability, 1 - probability) + 1e-12))
        error = probability - targets
        weights -= learning_rate * inputs.T @ error / len(targets)
        bias -= learning_rate * error.mean()
    return float(loss)


def test(weights, bias, data):
    """Returns loss and accuracy."""
    inputs, targets = data
    probability = predict(weights, bias, inputs)
    loss = -np.mean(np.log(np.where(targets == 1, probability, 1 - probability) + 1e-12))
    return float(loss), float(np.mean((probability > 0.5) == targets))
