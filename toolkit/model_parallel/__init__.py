"""Systems that cut a model: its matrices, its layers, its vocabulary, its experts, its optimiser."""
