"""The engine on a GPU at the full size of Wan2.2-A14B, with random weights made on the device: no files.

    python -m benchmarks.gpu                              # every section that has no results yet
    python -m benchmarks.gpu --sections attention,block   # only these;  --again  repeats finished ones
    python -m benchmarks.gpu --tiny                       # all of it at toy sizes, also on a CPU: a dry run
    python -m benchmarks.gpu.tables                       # docs/performance.md from the results

A section is a file here with a function `run(bench)`. Each runs in a process of its own, so that a failure or a time
limit affects no other section, and appends JSON lines to the results while it measures.
"""
