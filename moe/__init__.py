"""Mixture of experts whose experts are Q-Sparse and BitNet b1.58 layers."""
