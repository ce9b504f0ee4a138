"""A student as a model of its own: its folder in the form of the Hugging Face Hub, and images out of it."""
