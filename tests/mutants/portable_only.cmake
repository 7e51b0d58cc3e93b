# Included right after project(): an unknown processor gets the portable kernels alone, one translation unit instead of
# one per instruction set. The code that mutants change is the same for all of them.
set(CMAKE_SYSTEM_PROCESSOR "portable")
