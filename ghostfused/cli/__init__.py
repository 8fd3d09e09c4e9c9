"""``python -m ghostfused info | verify | fuse``: a file for each verb."""
