"""What a student saves against its teacher: by formula and as measured."""
