"""LlamaGen: tokens of a VQ grid drawn in raster order, class-conditional; its Distilled Decoding student."""

from pipeline.models.llamagen.config import Config
from pipeline.models.llamagen.student import Student
from pipeline.models.llamagen.teacher import Teacher
from pipeline.models.llamagen.tokenizer import Tokenizer

__all__ = ["Config", "Student", "Teacher", "Tokenizer"]
