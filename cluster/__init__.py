"""Hardware: where replicas run and who supervises them. Imports `pipeline`, never `jobs`."""
