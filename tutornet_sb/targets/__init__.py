"""The target store: outputs of a teacher, encoded and kept on disk."""
