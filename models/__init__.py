"""What is learned: a `Task` names the records, the model, the loss and the metrics of one kind of training
job.

This room knows nothing about privacy, networks or where data lives; it sees tensors only.
"""
