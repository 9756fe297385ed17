"""The ten most-loved ICLR 2021 methods as PyTorch Lightning parts."""

__version__ = "0.1.0"
