"""One evaluator a file: a pure function of (model, batch) -> {name: Mean}."""
