"""The savings of a student over its teacher, by formula and as measured."""
