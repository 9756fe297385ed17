"""Adaptive Federated Optimization (Reddi, Charles et al., ICLR 2021)."""

from lightning_iclr.fedopt.allocation import by_key, dirichlet, iid, pachinko, pathological
from lightning_iclr.fedopt.callbacks import ClientUpdates, EffectiveStep, LabelMatrix, RoundCurves
from lightning_iclr.fedopt.compression import EightBit, TopK
from lightning_iclr.fedopt.data import FederatedDataModule
from lightning_iclr.fedopt.embedded_tasks import FederatedDigits, ShakespeareRoles
from lightning_iclr.fedopt.encoders import ImageEncoder
from lightning_iclr.fedopt.evaluation import ClientEvaluation
from lightning_iclr.fedopt.flower import FedOptFlower, flower_server_app, lightning_client_app
from lightning_iclr.fedopt.loader import FederatedLoader, Stragglers
from lightning_iclr.fedopt.model import (
    CharacterLSTM,
    DigitsConvNet,
    EMNISTAutoencoder,
    EMNISTConvNet,
    ResNet18,
    StackOverflowLSTM,
    TagClassifier,
)
from lightning_iclr.fedopt.module import Autoencoder, Classifier, LanguageModel
from lightning_iclr.fedopt.normalization import replace_batch_norm
from lightning_iclr.fedopt.optim import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi
from lightning_iclr.fedopt.partition import (
    DirichletPartitioner,
    IIDPartitioner,
    KeyPartitioner,
    PachinkoPartitioner,
    PathologicalPartitioner,
    label_matrix,
)
from lightning_iclr.fedopt.plan import ClientTask
from lightning_iclr.fedopt.strategy import FedOptStrategy
from lightning_iclr.fedopt.text_encoders import CharacterEncoder, TagEncoder, WordEncoder
from lightning_iclr.fedopt.zipf import ZipfTags

__all__ = [
    "Autoencoder",
    "CharacterEncoder",
    "CharacterLSTM",
    "Classifier",
    "ClientEvaluation",
    "ClientTask",
    "ClientUpdates",
    "DigitsConvNet",
    "DirichletPartitioner",
    "EMNISTAutoencoder",
    "EMNISTConvNet",
    "EffectiveStep",
    "EightBit",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedOptFlower",
    "FedOptStrategy",
    "FedYogi",
    "FederatedDataModule",
    "FederatedDigits",
    "FederatedLoader",
    "IIDPartitioner",
    "ImageEncoder",
    "KeyPartitioner",
    "LabelMatrix",
    "LanguageModel",
    "PachinkoPartitioner",
    "PathologicalPartitioner",
    "ResNet18",
    "RoundCurves",
    "ShakespeareRoles",
    "StackOverflowLSTM",
    "Stragglers",
    "TagClassifier",
    "TagEncoder",
    "TopK",
    "WordEncoder",
    "ZipfTags",
    "by_key",
    "dirichlet",
    "flower_server_app",
    "iid",
    "label_matrix",
    "lightning_client_app",
    "pachinko",
    "pathological",
    "replace_batch_norm",
]
