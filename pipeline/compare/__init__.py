"""Several runs side by side, from their directories alone: what differs, where each got, at what cost.

    select   which run directories the words of a command line mean
    runs     what is known of one run: configuration, numbers, machine
    summary  tables: what differs in the configurations, results at equal tokens, speed and memory
    plots    figures: loss over tokens, operations and activated parameters, speed, gradients, layers, experts
    report   all of it as PNG, Markdown, JSON and one HTML page
    search   asks MLflow for runs                                 (a process of its own: `launch` imports no mlflow)
    publish  puts a report into MLflow                            (likewise)

Neither torch nor MLflow is needed for a comparison, so it works on a laptop to which the directories were copied.
"""
