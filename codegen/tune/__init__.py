"""Measured schedules of kernels: a search by TVM's meta_schedule, and a database of what was found."""
