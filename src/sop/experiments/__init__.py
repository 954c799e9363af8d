"""Experiments: questions that one run cannot answer, asked of many trainings on the same recorded data.

sop experiment x-ind      how can RECAP be used on a base policy that never saw an advantage indicator?

x_ind      the command: streams, one process per arm, then the report
plan       its numbers, and the arms
stream     what a recorded run gives to all arms alike
rules      the learning rules of the arms
training   one arm's training, from the learner's own parts
measures   branches, chunks, success;  lookahead   the sign of what the indicator does
arm        one arm's process
pooling    over seeds;  report   summary.json, table.md;  figure   x-ind.png
"""
