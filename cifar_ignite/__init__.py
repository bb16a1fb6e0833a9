"""Train CIFAR-10 ResNets on PyTorch-Ignite: small, readable, fast."""

__version__ = "0.1.0"
