"""What people want and when: specs, the command line, reports. Imports `cluster` and `pipeline`."""
