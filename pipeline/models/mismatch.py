"""Why a weight file does not fit: which network it holds instead, or which field of the recipe is wrong.

The names are those of the official files. A family that is not listed gets the general advice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class FileKind:
    """A sort of file: a key that only it has, and the fields of ``teacher.config`` that its shapes betray.

    A field is the axis of a tensor, with what to add to its size, or the count of the numbered modules below a name.
    """

    name: str
    mark: str
    sizes: Mapping[str, tuple[str, int, int]] = field(default_factory=dict)
    counts: Mapping[str, str] = field(default_factory=dict)

    def fields(self, weights: Mapping[str, Tensor]) -> dict[str, int]:
        """What the weights say of the network's Config."""
        out = {name: _numbered(weights, below) for name, below in self.counts.items()}
        for name, (key, axis, added) in self.sizes.items():
            if key in weights and weights[key].dim() > axis:
                out[name] = weights[key].shape[axis] + added
        return out


VAR = {
    "width": ("word_embed.weight", 0, 0),
    "code_dim": ("word_embed.weight", 1, 0),
    "classes": ("class_emb.weight", 0, -1),
    "vocabulary": ("head.weight", 0, 0),
    "heads": ("blocks.0.attn.scale_mul_1H11", 1, 0),
}
LLAMAGEN = {
    "dim": ("output.weight", 1, 0),
    "classes": ("cls_embedding.embedding_table.weight", 0, -1),
    "caption_dim": ("cls_embedding.cap_proj.fc1.weight", 1, 0),
    "caption_length": ("cls_embedding.uncond_embedding", 0, 0),
    "vocabulary": ("output.weight", 0, 0),
}
CODES = {
    "vocabulary": ("quantize.embedding.weight", 0, 0),
    "code_dim": ("quantize.embedding.weight", 1, 0),
    "channels": ("encoder.conv_in.weight", 0, 0),
}
KINDS = (  # the first whose mark is there
    FileKind("VAR student", "layerwise_n_d_embed.0.weight", VAR, {"depth": "blocks"}),
    FileKind("VAR transformer", "blocks.0.attn.mat_qkv.weight", VAR, {"depth": "blocks"}),
    FileKind("LlamaGen student", "final_layer_conti.linear.weight", LLAMAGEN, {"layers": "layers"}),
    FileKind("LlamaGen transformer", "layers.0.attention.wqkv.weight", LLAMAGEN, {"layers": "layers"}),
    FileKind("VAR tokenizer", "quantize.quant_resi.qresi_ls.0.weight", CODES),
    FileKind(
        "LlamaGen tokenizer",
        "encoder.conv_blocks.0.res.0.norm1.weight",
        CODES | {"z_channels": ("quant_conv.weight", 1, 0)},
    ),
)


def advice(found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """What to do about weights ``found`` that do not fit a network whose own are ``own``; the end of a sentence."""
    here, wanted = _kind(found), _kind(own)
    if here and wanted and here != wanted:
        return f"the file holds a {here.name} where the recipe wants a {wanted.name}: check which URI names which file."
    if here and wanted:
        theirs, ours = here.fields(found), wanted.fields(own)
        wrong = [name for name in theirs if name in ours and theirs[name] != ours[name]]
        if wrong:
            changes = " and ".join(f"teacher.config.{name} to {theirs[name]} (it is {ours[name]})" for name in wrong)
            return f"to describe the file, set {changes}."
    return "check that teacher.family and teacher.config describe the file."


def _kind(weights: Iterable[str]) -> FileKind | None:
    return next((kind for kind in KINDS if kind.mark in weights), None)


def _numbered(weights: Iterable[str], below: str) -> int:
    """How many modules ``below``.0, ``below``.1, ... there are."""
    return len({key.split(".")[1] for key in weights if key.startswith(f"{below}.")})
