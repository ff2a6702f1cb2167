"""Tensors in, tensors out: operations of a sparse ternary linear layer, without modules, configs, process groups."""
