"""One run on one or more processes: environment, process group, collectives; a single process is world size 1."""
