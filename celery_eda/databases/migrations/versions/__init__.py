"""One file per revision, each written out: what a revision does never changes afterwards."""
