"""The statistics of statistics.py in one pass over memory: C on the CPU (cpu.py, cpu.c) and Triton on NVIDIA GPUs (cuda.py).

Both are optional and give the same rows as the plain implementation, which is used where there is no compiler, or where the environment
variable TORCHSAT_KERNELS is 0.
"""
