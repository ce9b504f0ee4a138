"""Distilled Decoding on Ray: from sample ids to a scored one-step generator.

Reading order follows the data: noise -> flow -> models -> pairs -> generate -> losses -> distill -> samplers ->
metrics -> evaluate -> report.
"""
