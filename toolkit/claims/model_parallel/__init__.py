"""Claims of the systems that cut a model."""
