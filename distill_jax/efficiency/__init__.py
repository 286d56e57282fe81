"""The savings of a student compared to its teacher, computed and measured."""
