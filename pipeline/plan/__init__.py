"""`qsparse plan`: memory and step time of a run before there is a machine for it.

    model_costs   matrices, formats and parameters of each layer, from the configuration
    layout        sizes of a layout, layers of a stage
    memory        bytes per GPU by category
    links         bytes that travel and how long they take
    layer_time    seconds of the kernels of a layer
    step_time     seconds of a step by category
    search        layouts of a cluster, the fastest that fit
    report        tables and pictures
    accuracy      estimates against measured runs

Nothing here imports torch.  What is estimated is bf16 training on GPUs with the fast kernels.
"""
