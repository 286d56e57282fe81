"""On-policy distillation: rounds in which the student trains on texts that it has sampled."""
