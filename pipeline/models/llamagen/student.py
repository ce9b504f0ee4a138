"""The Distilled Decoding student of LlamaGen (arXiv 2412.17153, App. C): the transformer on continuous codes.

The sequence is [T condition positions, token 0 .. token n - 1], T = 1 of a class; token i is read **and predicted** at
position T + i. Attribute names and their order are those of the official files (``LlamaGen-DD/llamagen-B.pt``).

The authors released no student of captions. What their paper leaves open is decided as the teacher does it, whose
layers are copied: captions are masked as there, all of their positions are data, and what moves the head is the mean of
the projected caption. This gives the 756M parameters of the paper's Table 3; nothing that has weights of its own would.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models import base
from pipeline.models.conditions import Condition
from pipeline.models.llamagen.captions import CaptionEmbedding, positions, sequence_mask
from pipeline.models.llamagen.config import Config
from pipeline.models.llamagen.teacher import Teacher
from pipeline.models.llamagen.transformer import INIT_STD, ClassEmbedding, Layer, RMSNorm, rotary

RIDGE = 1e-6  # per code; only keeps the fit solvable when there are fewer codes than unknowns


class ContinuousHead(nn.Module):
    """The embedding head: linear(LN(h) * (1 + scale) + shift); the class, or the caption's mean, moves both."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(2, config.dim) / config.dim**0.5)
        self.linear = nn.Linear(config.dim, config.code_dim)

    def forward(self, h: Tensor, pooled: Tensor) -> Tensor:
        """h [B, n, dim], pooled condition [B, 1, dim] -> embeddings [B, n, C]."""
        shift, scale = (self.scale_shift_table + pooled).chunk(2, dim=1)
        return self.linear(F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift)


class Student(base.Student):
    """A LlamaGen transformer that maps X_t to logits and embeddings of all tokens in one causal pass.

    Its null caption is in the state_dict for the layout's sake: guidance is distilled into the weights.
    """

    cls_embedding: ClassEmbedding | CaptionEmbedding
    released = (("ema",), ("model",))
    no_choice = "LlamaGen students are causal and have no such choice"

    def __init__(self, config: Config, codebook: Tensor) -> None:
        super().__init__()
        self.config = config
        self.layout = config.layout
        if config.caption_dim:
            # Real even under the meta device, so that a file which lacks it can be loaded there: nothing reads it.
            null = torch.zeros(config.caption_length, config.caption_dim, device="cpu")
            self.cls_embedding = CaptionEmbedding(config, null)
        else:
            self.cls_embedding = ClassEmbedding(config)
        self.tok_embeddings = nn.Linear(config.code_dim, config.dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim)
        self.output = nn.Linear(config.dim, config.vocabulary, bias=False)
        self.final_layer_conti = ContinuousHead(config)
        self.n_d_embed = nn.Embedding(2, config.dim)  # row 0 marks noise, row 1 data
        self.register_buffer("codebook", codebook.detach().clone(), persistent=False)

    def heads(self) -> tuple[tuple[nn.Module, ...], tuple[nn.Module, ...]]:
        return (self.norm, self.output), (self.final_layer_conti,)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> base.Prediction:
        """x_t [B, n, C], t [B] int64 (AR steps from 1, may differ within a batch) -> logits and embeddings.

        The class, or all of the caption, and the t - 1 tokens before AR step t are data, the others noise. Raises
        TypeError and ValueError for a condition that is not this network's.
        """
        given, first = self.cls_embedding(condition), positions(condition)
        h = torch.cat([given, self.tok_embeddings(x_t)], dim=1)
        data = torch.arange(h.shape[1], device=h.device) < first - 1 + t[:, None]
        noise_row, data_row = self.n_d_embed.weight
        h = h + torch.where(data[..., None], data_row, noise_row)
        rotations, mask = rotary(self.config, h.device, first), sequence_mask(condition, x_t.shape[1])
        for layer in self.layers:
            h = layer(h, rotations, mask=mask)
        h, pooled = h[:, first:], self.cls_embedding.pooled(given, condition)
        return base.Prediction(base.answer(self.output, self.norm(h)), self.final_layer_conti(h, pooled))

    @classmethod
    def from_teacher(cls, teacher: Teacher, seed: int) -> Student:
        """A float32 student that starts from its teacher's condition embedding, layers, final norm and logits head.

        The input layer is fitted to the teacher's token table (``fit_embeddings``); the official code starts
        it from noise. New parameters come from a generator seeded by ``seed``: the noise/data rows and the
        embedding head are normal with std 0.02, the head's scale-shift table normal / sqrt(dim), its bias
        zero.
        """
        config, table = teacher.config, teacher.network.tok_embeddings.weight
        with torch.device("meta"):  # every parameter is given below; loading strictly proves it
            student = cls(config, teacher.codebook)
        state = {name: value.float().clone() for name, value in teacher.network.state_dict().items()}
        state["tok_embeddings.weight"], state["tok_embeddings.bias"] = fit_embeddings(teacher.codebook, table)
        random = torch.Generator().manual_seed(seed)

        def normal(std: float, *shape: int) -> Tensor:
            return (std * torch.randn(shape, generator=random)).to(table.device)

        state["final_layer_conti.scale_shift_table"] = normal(config.dim**-0.5, 2, config.dim)
        state["final_layer_conti.linear.weight"] = normal(INIT_STD, config.code_dim, config.dim)
        state["final_layer_conti.linear.bias"] = normal(0.0, config.code_dim)
        state["n_d_embed.weight"] = normal(INIT_STD, 2, config.dim)
        student.load_state_dict(state, assign=True)
        return student


@torch.no_grad()
def fit_embeddings(codebook: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The linear layer that maps code j [C] closest to row j of the teacher's token table [V, dim].

    Returns weight [dim, C] and bias [dim], float32: least squares of sum_j |W e_j + b - table_j|^2 over the
    codebook, in float64 with a tiny ridge. Data tokens then enter the copied layers about where these expect
    them.
    """
    codes = F.pad(codebook.double(), (0, 1), value=1.0)
    ridge = RIDGE * len(codes) * torch.eye(codes.shape[1], dtype=codes.dtype, device=codes.device)
    solution = torch.linalg.solve(codes.T @ codes + ridge, codes.T @ table.double())
    return solution[:-1].T.float().contiguous(), solution[-1].float()
