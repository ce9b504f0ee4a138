"""The three jobs from start to end, and what is known before them: what is missing, the costs, the state.

In comes a recipe; out go pair sets, students and reports. Algorithms, numbers and pages are other rooms'.
"""
