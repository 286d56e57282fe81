"""The training step, its state, the training loop, and the loop's inputs and outputs."""
