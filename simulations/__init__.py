"""Many clients on one machine: the local engine, partitions, scenarios and the planning of budgets."""
