"""VAR: next-scale prediction (arXiv 2404.02905), its multi-scale VQVAE and its Distilled Decoding student."""

from pipeline.models.var.config import Config
from pipeline.models.var.student import Student
from pipeline.models.var.teacher import Teacher
from pipeline.models.var.tokenizer import Tokenizer

__all__ = ["Config", "Student", "Teacher", "Tokenizer"]
