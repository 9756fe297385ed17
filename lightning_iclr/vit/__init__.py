"""The Vision Transformer: "An Image is Worth 16x16 Words" (Dosovitskiy et al., ICLR 2021)."""

from lightning_iclr.prediction import PredictionWriter
from lightning_iclr.vit.affine import affine, random_affine
from lightning_iclr.vit.analysis import (
    attention_distance,
    attention_maps,
    patch_filters,
    position_similarity,
    rollout,
)
from lightning_iclr.vit.augment import RandAugment, RandomResizedCrop
from lightning_iclr.vit.callbacks import (
    AttentionDistance,
    MaskedPatchReconstruction,
    PatchFilters,
    PositionSimilarity,
    RolloutOverlay,
    TrainingCurves,
)
from lightning_iclr.vit.checkpoint import load_official, load_pretrained
from lightning_iclr.vit.conversion import convert_state_dict, to_hf, to_official, to_timm
from lightning_iclr.vit.data import DigitsDataModule, MNIST5kDataModule
from lightning_iclr.vit.evaluation import FewShotEvaluation
from lightning_iclr.vit.fewshot import FewShotLeastSquares
from lightning_iclr.vit.image_data import ImageDataModule
from lightning_iclr.vit.mixing import cutmix, mixup
from lightning_iclr.vit.model import VisionTransformer
from lightning_iclr.vit.module import MaskedPatchPretraining, ViTClassifier
from lightning_iclr.vit.optim import param_groups
from lightning_iclr.vit.positions import resize_position_embedding, sincos2d
from lightning_iclr.vit.pretext import MaskedPatchPrediction
from lightning_iclr.vit.resnet import HybridStem

__all__ = [
    "AttentionDistance",
    "DigitsDataModule",
    "FewShotEvaluation",
    "FewShotLeastSquares",
    "HybridStem",
    "ImageDataModule",
    "MNIST5kDataModule",
    "MaskedPatchPrediction",
    "MaskedPatchPretraining",
    "MaskedPatchReconstruction",
    "PatchFilters",
    "PositionSimilarity",
    "PredictionWriter",
    "RandAugment",
    "RandomResizedCrop",
    "RolloutOverlay",
    "TrainingCurves",
    "ViTClassifier",
    "VisionTransformer",
    "affine",
    "attention_distance",
    "attention_maps",
    "convert_state_dict",
    "cutmix",
    "load_official",
    "load_pretrained",
    "mixup",
    "param_groups",
    "patch_filters",
    "position_similarity",
    "random_affine",
    "resize_position_embedding",
    "rollout",
    "sincos2d",
    "to_hf",
    "to_official",
    "to_timm",
]
