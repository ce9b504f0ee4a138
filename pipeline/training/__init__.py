"""Alg. 2: what a distillation plans, sees, minimises and carries from step to step.

In come a stream of pairs and a student that starts as its teacher; out go checkpoints and exported students. The
driver is in workflow/distill.py.
"""
