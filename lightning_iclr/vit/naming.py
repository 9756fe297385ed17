"""What each library calls the Vision Transformer's weights, and how it lays them out.

Our names are timm's. "Split" names are ours with the fused projections taken apart: ``attn.q``, ``attn.k``, ``attn.v``
for ``attn.qkv``, and ``attn_pool.k``, ``attn_pool.v`` for ``attn_pool.kv``.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Group(NamedTuple):
    """Modules or parameters below a numbered prefix, such as the layers of each block.

    Attributes:
        ours: Our prefix with ``{}`` for each number.
        theirs: Their prefix, with as many.
        names: Our names below the prefix, each with theirs.
        offset: Number of their first block; ours is 0.
    """

    ours: str
    theirs: str
    names: Mapping[str, str]
    offset: int = 0


class Names:
    """Translate the names of a library's weights to split names and back.

    Args:
        groups: Names of modules, and of parameters that belong to no module.
        separator: What their names put between a module and its parameter.

    Examples:
        >>> BIG_VISION.ours("Transformer/encoderblock_3/LayerNorm_1/scale")
        'blocks.3.norm2.weight'
        >>> HUGGING_FACE.theirs("blocks.3.attn.q.bias")
        'layers.3.attention.q_proj.bias'
    """

    def __init__(self, groups: Iterable[Group], separator: str = ".") -> None:
        self.groups = tuple(groups)
        self.separator = separator

    def ours(self, name: str) -> str | None:
        """Translate their name to a split name; ``None`` where there is none."""
        module, _, leaf = name.rpartition(self.separator)
        leaf = {"kernel": "weight", "scale": "weight"}.get(leaf, leaf) if self.separator == "/" else leaf
        for group in self.groups:
            backwards = {theirs: ours for ours, theirs in group.names.items()}
            whole = _rename(name, group.theirs, group.ours, backwards, -group.offset)
            renamed = _rename(module, group.theirs, group.ours, backwards, -group.offset)
            candidate = f"{renamed}.{leaf}" if whole is None and renamed is not None else whole
            # The way back tells a norm's "scale" from a "kernel", which it does not have.
            if candidate is not None and self.theirs(candidate) == name:
                return candidate
        return None

    def theirs(self, name: str) -> str | None:
        """Translate a split name to theirs; ``None`` where there is none."""
        module, _, leaf = name.rpartition(".")
        for group in self.groups:
            whole = _rename(name, group.ours, group.theirs, group.names, group.offset)
            if whole is not None:
                return whole
            renamed = _rename(module, group.ours, group.theirs, group.names, group.offset)
            if renamed is not None:
                if self.separator == "/" and leaf == "weight":
                    leaf = "scale" if is_norm(module) else "kernel"
                return f"{renamed}{self.separator}{leaf}"
        return None


def fuse(split: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Join queries, keys and values into our fused projections.

    Returns:
        The weights by our names, and the split names of parts that could not be joined, missing or of another shape.
    """
    fused: dict[str, Tensor] = {}
    seen: set[str] = set()
    broken: list[str] = []
    for name, tensor in split.items():
        whole = fused_name(name)
        if whole == name:
            fused[name] = tensor
        elif whole not in seen:
            seen.add(whole)
            parts = split_names(whole)
            absent = [part for part in parts if part not in split]
            odd = [] if absent else [part for part in parts if split[part].shape != tensor.shape or not tensor.ndim]
            if absent or odd:
                broken += absent + odd
            else:
                fused[whole] = torch.cat([split[part] for part in parts])
    return fused, broken


def unfuse(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take our fused projections apart into queries, keys and values."""
    split: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        parts = split_names(name)
        split.update(zip(parts, tensor.chunk(len(parts)) if len(parts) > 1 else [tensor], strict=True))
    return split


def fused_name(name: str) -> str:
    """Map a split name to the name of the weight that holds it."""
    name = re.sub(r"\battn\.[qkv]\.(weight|bias)$", r"attn.qkv.\1", name)
    return re.sub(r"\battn_pool\.[kv]\.(weight|bias)$", r"attn_pool.kv.\1", name)


def split_names(name: str) -> list[str]:
    """Map our name to the split names of its parts; itself where nothing is fused."""
    match = re.fullmatch(r"(.*\battn\.|attn_pool\.)(qkv|kv)\.(weight|bias)", name)
    return [name] if match is None else [f"{match[1]}{part}.{match[3]}" for part in match[2]]


def is_norm(module: str) -> bool:
    """Whether our module of this name is a LayerNorm or GroupNorm, whose scale flax does not call a kernel."""
    return module.rpartition(".")[2].startswith("norm")


def from_flax(name: str, array: Tensor) -> Tensor:
    """Turn an array of the official code with a split name into torch's layout.

    Convolutions are (H, W, in, out) there and dense kernels (in, out); attention keeps its heads apart.

    Raises:
        ValueError: The array does not have as many dimensions as its name asks for.
    """
    module, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        return array
    if is_norm(module):
        # Old files of the hybrids keep GroupNorm's parameters as (1, 1, 1, C).
        return array.reshape(-1) if array.ndim and array.numel() == array.shape[-1] else array
    if leaf == "bias":
        return array.reshape(-1) if array.ndim == 2 and _is_attention_input(module) else array
    if array.ndim == 4:
        return array.permute(3, 2, 0, 1).contiguous()
    if array.ndim == 3:
        return (array.flatten(0, 1) if module.endswith("proj") else array.flatten(1)).T.contiguous()
    if array.ndim == 2:
        return array.T.contiguous()
    raise ValueError(f"a kernel has 2 to 4 dimensions, got shape {tuple(array.shape)}")


def to_flax(name: str, tensor: Tensor, num_heads: int) -> Tensor:
    """Turn a weight with a split name into the official code's layout."""
    module, _, leaf = name.rpartition(".")
    if leaf == "bias" and _is_attention_input(module):
        return tensor.reshape(num_heads, -1)
    if leaf != "weight" or is_norm(module):
        return tensor
    if tensor.ndim == 4:
        return tensor.permute(2, 3, 1, 0).contiguous()
    kernel = tensor.T.contiguous()
    if _is_attention_input(module):
        return kernel.reshape(kernel.shape[0], num_heads, -1)
    if module.endswith(("attn.proj", "attn_pool.proj")):
        return kernel.reshape(num_heads, -1, kernel.shape[1])
    return kernel


def _is_attention_input(module: str) -> bool:
    return re.search(r"\b(attn|attn_pool)\.[qkv]$", module) is not None


def _rename(name: str, prefix: str, new_prefix: str, names: Mapping[str, str], shift: int) -> str | None:
    match = re.match(re.escape(prefix).replace(r"\{\}", r"(\d+)"), name)
    if match is None or name[match.end() :] not in names:
        return None
    return new_prefix.format(*(int(number) + shift for number in match.groups())) + names[name[match.end() :]]


def _official(positions: str, norm2: int, attention: int, mlp: int) -> Names:
    def attend(number: int) -> dict[str, str]:
        parts = {"q": "query", "k": "key", "v": "value", "proj": "out"}
        return {ours: f"MultiHeadDotProductAttention_{number}/{theirs}" for ours, theirs in parts.items()}

    root = {
        "cls_token": "cls",
        "pos_embed": positions,
        "patch_embed.backbone.stem.conv": "conv_root",
        "patch_embed.backbone.stem.norm": "gn_root",
        "patch_embed.proj": "embedding",
        "norm": "Transformer/encoder_norm",
        "pre_logits": "pre_logits",
        "head": "head",
    }
    block = {
        "norm1": "LayerNorm_0",
        **{f"attn.{ours}": theirs for ours, theirs in attend(attention).items()},
        "norm2": f"LayerNorm_{norm2}",
        "mlp.fc1": f"MlpBlock_{mlp}/Dense_0",
        "mlp.fc2": f"MlpBlock_{mlp}/Dense_1",
    }
    pool = {
        "latent": "probe",
        **attend(0),
        "norm": "LayerNorm_0",
        "mlp.fc1": "MlpBlock_0/Dense_0",
        "mlp.fc2": "MlpBlock_0/Dense_1",
    }
    unit = {f"{kind}{i}": f"{theirs}{i}" for i in (1, 2, 3) for kind, theirs in (("conv", "conv"), ("norm", "gn"))}
    unit |= {"downsample.conv": "conv_proj", "downsample.norm": "gn_proj"}
    return Names(
        [
            Group("", "", root),
            Group("blocks.{}.", "Transformer/encoderblock_{}/", block),
            Group("attn_pool.", "MAPHead_0/", pool),
            Group("patch_embed.backbone.stages.{}.blocks.{}.", "block{}/unit{}/", unit, offset=1),
        ],
        separator="/",
    )


def _hugging_face(blocks: str, attention: Mapping[str, str], mlp: tuple[str, str]) -> Names:
    root = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
        "pre_logits": "pooler.dense",
        "head": "classifier",
    }
    block = {
        "norm1": "layernorm_before",
        **{f"attn.{ours}": theirs for ours, theirs in attention.items()},
        "norm2": "layernorm_after",
        "mlp.fc1": mlp[0],
        "mlp.fc2": mlp[1],
    }
    return Names([Group("", "", root), Group("blocks.{}.", blocks, block)])


VIT_JAX = _official("Transformer/posembed_input/pos_embedding", norm2=2, attention=1, mlp=3)
BIG_VISION = _official("pos_embedding", norm2=1, attention=0, mlp=0)
HUGGING_FACE = _hugging_face(
    "layers.{}.",
    {"q": "attention.q_proj", "k": "attention.k_proj", "v": "attention.v_proj", "proj": "attention.o_proj"},
    ("mlp.fc1", "mlp.fc2"),
)
HUGGING_FACE_4 = _hugging_face(
    "encoder.layer.{}.",
    {
        "q": "attention.attention.query",
        "k": "attention.attention.key",
        "v": "attention.attention.value",
        "proj": "attention.output.dense",
    },
    ("intermediate.dense", "output.dense"),
)
