"""The paper, as pure tensor functions; knows torch and nothing else."""
