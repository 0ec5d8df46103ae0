"""Where sums meet: the server application, its cohorts, aggregation and checkpoints."""
