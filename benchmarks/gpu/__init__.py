"""What the engine does on a GPU at the full size of Wan2.2-A14B, with random weights made on the device: no files.

    python -m benchmarks.gpu                              # every section that is not in the results yet
    python -m benchmarks.gpu --sections attention,block   # only these;  --again  although they are there
    python -m benchmarks.gpu --tiny                       # all of it at toy sizes, also on a CPU: a dry run
    python -m benchmarks.gpu.tables                       # docs/performance.md from the results

A section is one file here with a function `run(bench)`. Each runs in a process of its own, so that a failure or a time
limit costs no other one, and appends JSON lines to the results as it measures.
"""
