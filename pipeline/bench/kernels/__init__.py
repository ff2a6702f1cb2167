"""`qsparse bench kernels`: correctness and speed of every kernel, against other libraries and against the floor."""
