"""Evidence: GRPO in its forms against every cheaper way, from one checkpoint, at equal CPU time, with seeds.

python -m benchmarks.evidence --help
"""
