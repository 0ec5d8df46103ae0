"""The border: everything that may cross from a data holder to anyone else."""
