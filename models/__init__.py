"""What is computed: the model graph, its front ends, and strategies applied to it.

A front end turns a model's description into a graph of operators with named dims; a strategy
applied to that graph gives the sharded graph with its collectives and stages; the executor runs
the sharded graph in numpy and so proves that it computes what the model computes. Nothing here
knows of hardware or of time, and nothing here imports `costmodel` or `search`.
"""
