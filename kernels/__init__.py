"""Tensors in, tensors out: the operations of a sparse ternary linear layer, without modules, configs or process groups."""
