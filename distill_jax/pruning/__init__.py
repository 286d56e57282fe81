"""What `shrink` is made of: shapes, what matters in a model, what is kept, the cut itself."""
