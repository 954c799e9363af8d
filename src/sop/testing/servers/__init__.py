"""Real servers on this machine, for tests, benchmarks and demonstrations, and a proxy that breaks links to them.

Each is a context manager that comes up on free ports of 127.0.0.1, keeps its data in a folder of the caller, and can be
killed and started again on the same ports and data. A server ends with the process that started it, however that dies.
"""
