"""The public faces: one file per API, all over the same invoke."""
